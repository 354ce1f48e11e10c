"""A chat of several turns: each turn reads only what is new, the rest comes from the prefix cache."""

from __future__ import annotations

from pippin import Engine

questions = ["What is 12 + 30?", "And 40 - 15?", "How many letters does apple have?"]

if __name__ == "__main__":
    messages: list[dict[str, str]] = []
    with Engine() as engine:
        for question in questions:
            messages.append({"role": "user", "content": question})
            answer = engine.chat(messages, {"temperature": 0, "max_new_tokens": 60})
            messages.append({"role": "assistant", "content": answer["text"]})
            meta = answer["meta_info"]
            print(f"{question}\n  {answer['text'].strip()}")
            print(f"  ({meta['cached_tokens']} of {meta['prompt_tokens']} prompt tokens were cached)")
