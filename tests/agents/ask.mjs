// What each client of npm is asked, and what the shipped model must answer.

import assert from "node:assert/strict";

export { assert };
export const url = process.argv[2];
export const sum = "What is 12 + 30?";
export const weather = "What is the weather in Oslo?";
export const description = "Get the current weather in a city.";
export const schema = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
export const result = '{"temperature": 7, "sky": "rain"}';

/** An answer, and the same one streamed in several pieces. */
export function checkSum(whole, pieces) {
  assert.match(whole, /42/);
  assert.equal(pieces.join(""), whole);
  assert.ok(pieces.filter(Boolean).length > 1, JSON.stringify(pieces));
}

export function checkCall(name, given) {
  assert.equal(name, "get_weather");
  assert.deepEqual(typeof given === "string" ? JSON.parse(given) : given, { city: "Oslo" });
}
