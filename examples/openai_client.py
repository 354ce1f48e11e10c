"""OpenAI's client against a running server: ``pippin serve``, then ``python examples/openai_client.py``."""

from __future__ import annotations

import os

from openai import OpenAI

if __name__ == "__main__":
    url = os.environ.get("OPENAI_BASE_URL", "http://localhost:30000/v1")
    client = OpenAI(base_url=url, api_key="none")
    stream = client.chat.completions.create(
        model="any",
        messages=[{"role": "user", "content": "What is 12 + 30?"}],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        elif chunk.usage:
            print(f"\n{chunk.usage.prompt_tokens} tokens in, {chunk.usage.completion_tokens} out")
