// The openai package of npm: chats, responses, calls and their results, whole and streamed.

import OpenAI from "openai";

import { assert, checkCall, checkSum, description, result, schema, sum, url, weather } from "./ask.mjs";

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "-", maxRetries: 0 });
const options = { model: "any", temperature: 0 };
const asked = [{ role: "user", content: sum }];
const pieces = [];
for await (const chunk of await client.chat.completions.create({ ...options, messages: asked, stream: true })) {
  pieces.push(chunk.choices[0].delta.content ?? "");
}
const whole = await client.chat.completions.create({ ...options, messages: asked });
checkSum(whole.choices[0].message.content, pieces);

const tools = [{ type: "function", function: { name: "get_weather", description, parameters: schema } }];
const question = [{ role: "user", content: weather }];
const { message } = (await client.chat.completions.create({ ...options, messages: question, tools })).choices[0];
const [call] = message.tool_calls;
checkCall(call.function.name, call.function.arguments);
const stream = client.chat.completions.stream({ ...options, messages: question, tools });
const [same] = (await stream.finalChatCompletion()).choices[0].message.tool_calls;
checkCall(same.function.name, same.function.arguments);
const history = [...question, message, { role: "tool", tool_call_id: call.id, content: result }];
assert.match((await client.chat.completions.create({ ...options, messages: history, tools })).choices[0].message.content, /7/);

const functions = [{ type: "function", name: "get_weather", description, parameters: schema, strict: false }];
const first = await client.responses.create({ ...options, input: weather, tools: functions });
checkCall(first.output[0].name, first.output[0].arguments);
const output = [{ type: "function_call_output", call_id: first.output[0].call_id, output: result }];
const kinds = [];
let text = "";
const then = { ...options, previous_response_id: first.id, input: output, tools: functions, stream: true };
for await (const event of await client.responses.create(then)) {
  kinds.push(event.type);
  if (event.type === "response.output_text.delta") text += event.delta;
}
assert.match(text, /7/);
assert.deepEqual([kinds[0], kinds.at(-1)], ["response.created", "response.completed"]);
