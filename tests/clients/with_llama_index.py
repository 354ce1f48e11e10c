"""LlamaIndex: an answer, a stream, a call and its result, each whole and streamed."""

from __future__ import annotations

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

from tests.clients.ask import DESCRIPTION, RESULT, SUM, URL, WEATHER, check_call, check_result, check_sum

model = OpenAILike(
    api_base=f"{URL}/v1", api_key="-", model="any", is_chat_model=True, is_function_calling_model=True, temperature=0
)
asked = [ChatMessage(role="user", content=SUM)]
check_sum(model.chat(asked).message.content or "", [part.delta or "" for part in model.stream_chat(asked)])


def get_weather(city: str) -> str:
    return RESULT


tool = FunctionTool.from_defaults(fn=get_weather, description=DESCRIPTION)
answer = model.chat_with_tools([tool], user_msg=WEATHER)
(call,) = model.get_tool_calls_from_response(answer)
check_call(call.tool_name, call.tool_kwargs)
*_, last = model.stream_chat_with_tools([tool], user_msg=WEATHER)
(same,) = model.get_tool_calls_from_response(last)
check_call(same.tool_name, same.tool_kwargs)
result = ChatMessage(role="tool", content=RESULT, additional_kwargs={"tool_call_id": call.tool_id})
history = [ChatMessage(role="user", content=WEATHER), answer.message, result]
check_result(model.chat_with_tools([tool], chat_history=history).message.content or "")
