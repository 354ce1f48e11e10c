// The ollama package of npm: chats, calls and their results, objects of a schema, whole and streamed.

import { Ollama } from "ollama";

import { assert, checkCall, checkSum, description, result, schema, sum, url, weather } from "./ask.mjs";

const client = new Ollama({ host: url });
const options = { model: "any", options: { temperature: 0 } };
const messages = [{ role: "user", content: sum }];
const pieces = [];
for await (const part of await client.chat({ ...options, messages, stream: true })) pieces.push(part.message.content);
checkSum((await client.chat({ ...options, messages })).message.content, pieces);

const tools = [{ type: "function", function: { name: "get_weather", description, parameters: schema } }];
const question = [{ role: "user", content: weather }];
const { message } = await client.chat({ ...options, messages: question, tools });
checkCall(message.tool_calls[0].function.name, message.tool_calls[0].function.arguments);
const history = [...question, message, { role: "tool", tool_name: "get_weather", content: result }];
assert.match((await client.chat({ ...options, messages: history, tools })).message.content, /7/);

const format = { type: "object", properties: { n: { type: "integer", minimum: 0, maximum: 99 } }, required: ["n"], additionalProperties: false };
const shaped = await client.generate({ ...options, prompt: sum, format });
assert.ok(JSON.parse(shaped.response).n < 100);
assert.equal((await client.list()).models.length, 1);
