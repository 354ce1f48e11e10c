// The anthropic package of npm: messages, calls and their results, whole and streamed.

import Anthropic from "@anthropic-ai/sdk";

import { assert, checkCall, checkSum, description, result, schema, sum, url, weather } from "./ask.mjs";

const client = new Anthropic({ baseURL: url, apiKey: "-", maxRetries: 0 });
const options = { model: "any", max_tokens: 200, temperature: 0 };
const asked = [{ role: "user", content: sum }];
const pieces = [];
const told = await client.messages.stream({ ...options, messages: asked }).on("text", (text) => pieces.push(text)).finalMessage();
checkSum(told.content[0].text, pieces);
assert.equal((await client.messages.create({ ...options, messages: asked })).content[0].text, told.content[0].text);

const tools = [{ name: "get_weather", description, input_schema: schema }];
const question = [{ role: "user", content: weather }];
const answer = await client.messages.create({ ...options, messages: question, tools });
assert.equal(answer.stop_reason, "tool_use");
checkCall(answer.content[0].name, answer.content[0].input);
const same = await client.messages.stream({ ...options, messages: question, tools }).finalMessage();
checkCall(same.content[0].name, same.content[0].input);
const back = { type: "tool_result", tool_use_id: answer.content[0].id, content: result };
const history = [...question, { role: "assistant", content: answer.content }, { role: "user", content: [back] }];
assert.match((await client.messages.create({ ...options, messages: history, tools })).content[0].text, /7/);
assert.ok((await client.messages.countTokens({ model: "any", messages: question, tools })).input_tokens > 20);
