"""litellm: an answer, a stream, a call and its result, each whole and streamed."""

from __future__ import annotations

from typing import Any

import litellm

from tests.clients.ask import RESULT, SUM, TOOL, URL, WEATHER, check_call, check_result, check_sum

options: dict[str, Any] = {"model": "openai/any", "api_base": f"{URL}/v1", "api_key": "-", "temperature": 0}
asked = [{"role": "user", "content": SUM}]
whole = litellm.completion(messages=asked, **options)
stream = litellm.completion(messages=asked, stream=True, **options)
check_sum(whole.choices[0].message.content, [chunk.choices[0].delta.content or "" for chunk in stream])

question: list[Any] = [{"role": "user", "content": WEATHER}]
message = litellm.completion(messages=question, tools=[TOOL], **options).choices[0].message
(call,) = message.tool_calls
check_call(call.function.name, call.function.arguments)
chunks = list(litellm.completion(messages=question, tools=[TOOL], stream=True, **options))
(same,) = litellm.stream_chunk_builder(chunks, messages=question).choices[0].message.tool_calls
check_call(same.function.name, same.function.arguments)
history = [*question, message, {"role": "tool", "tool_call_id": call.id, "content": RESULT}]
check_result(litellm.completion(messages=history, tools=[TOOL], **options).choices[0].message.content)
