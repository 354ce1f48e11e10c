"""LangChain: an answer, a stream, calls and their results, and an object of a schema."""

from __future__ import annotations

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI

from tests.clients.ask import RESULT, SUM, TOOL, URL, WEATHER, check_call, check_result, check_sum

model = ChatOpenAI(base_url=f"{URL}/v1", api_key="-", model="any", temperature=0)
check_sum(str(model.invoke(SUM).content), [str(chunk.content) for chunk in model.stream(SUM)])

able = model.bind_tools([TOOL])
answer = able.invoke(WEATHER)
(call,) = answer.tool_calls
check_call(call["name"], call["args"])
pieces = list(able.stream(WEATHER))
joined = pieces[0]
for piece in pieces[1:]:
    joined += piece
check_call(joined.tool_calls[0]["name"], joined.tool_calls[0]["args"])
history = [HumanMessage(WEATHER), answer, ToolMessage(RESULT, tool_call_id=call["id"])]
check_result(str(able.invoke(history).content))

schema = {
    "title": "Answer", "description": "A number.", "type": "object", "additionalProperties": False,
    "properties": {"number": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["number"],
}  # fmt: skip
found = model.with_structured_output(schema, method="json_schema").invoke(SUM)
assert isinstance(found, dict), found
assert 0 <= found["number"] <= 99, found
