// Vercel's AI SDK over each of its three providers: an answer, a stream, tools in several steps, an object of a schema.

import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

import { assert, checkCall, checkSum, description, result, sum, url, weather } from "./ask.mjs";

const baseURL = `${url}/v1`;
const openai = createOpenAI({ baseURL, apiKey: "-" });
const models = {
  chat: openai.chat("any"),
  responses: openai.responses("any"),
  compatible: createOpenAICompatible({ name: "pippin", baseURL, supportsStructuredOutputs: true })("any"),
  anthropic: createAnthropic({ baseURL, apiKey: "-" })("any"),
};

for (const [name, model] of Object.entries(models)) {
  const options = { model, temperature: 0, maxRetries: 0, maxOutputTokens: 200 };
  const whole = await generateText({ ...options, prompt: sum });
  const pieces = [];
  for await (const piece of streamText({ ...options, prompt: sum }).textStream) pieces.push(piece);
  checkSum(whole.text, pieces);

  const asked = [];
  const look = tool({
    description,
    inputSchema: z.object({ city: z.string() }),
    execute: (given) => {
      asked.push(given);
      return JSON.parse(result);
    },
  });
  const tools = { get_weather: look };
  const answer = await generateText({ ...options, prompt: weather, tools, stopWhen: stepCountIs(3) });
  assert.equal(answer.steps.length, 2, name);
  checkCall("get_weather", asked[0]);
  assert.match(answer.text, /7/, name);

  const { object } = await generateObject({ ...options, prompt: sum, schema: z.object({ n: z.number().int().min(0).max(99) }) });
  assert.ok(object.n >= 0 && object.n < 100, name);
}
