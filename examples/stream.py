"""Prints an answer as it is generated: ``python examples/stream.py "Tell me a story"``."""

from __future__ import annotations

import sys

from pippin import Engine

if __name__ == "__main__":
    question = " ".join(sys.argv[1:]) or "Tell me a short story about a fox."
    with Engine() as engine:
        shown = 0
        for answer in engine.chat([{"role": "user", "content": question}], {"max_new_tokens": 200}, stream=True):
            print(answer["text"][shown:], end="", flush=True)
            shown = len(answer["text"])
        print(f"\n({answer['meta_info']['completion_tokens']} tokens)")
