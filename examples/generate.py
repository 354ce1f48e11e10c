"""Several questions, one after the other, without a server: ``python examples/generate.py``."""

from __future__ import annotations

from pippin import Engine

prompts = ["What is 12 + 30?", "How do you spell apple?", "Which is larger, 7 or 12?"]

if __name__ == "__main__":
    with Engine() as engine:  # the demo model; give a directory or hub id for another
        chats = [engine.chat([{"role": "user", "content": prompt}], {"temperature": 0}) for prompt in prompts]
        for prompt, answer in zip(prompts, chats, strict=True):
            print(f"{prompt}\n  {answer['text'].strip()}")
