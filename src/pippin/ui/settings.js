// How answers are made. What is left empty is left to the server.

import { $, el } from "./dom.js";

const STORE = "pippin.settings";

// Name as the API has it, label, and what kind of input: a number's bounds and step, choices, or a text's rows.
const FIELDS = [
  ["system", "System prompt", { rows: 3 }],
  ["temperature", "Temperature", { min: 0, max: 5, step: 0.1 }],
  ["top_p", "Top p", { min: 0.01, max: 1, step: 0.01 }],
  ["top_k", "Top k", { min: -1, step: 1 }],
  ["min_p", "Min p", { min: 0, max: 1, step: 0.01 }],
  ["max_tokens", "Most tokens", { min: 1, step: 1 }],
  ["seed", "Seed", { step: 1 }],
  ["repetition_penalty", "Repetition penalty", { min: 0.01, max: 2, step: 0.01 }],
  ["presence_penalty", "Presence penalty", { min: -2, max: 2, step: 0.1 }],
  ["frequency_penalty", "Frequency penalty", { min: -2, max: 2, step: 0.1 }],
  ["stop", "Stop at (one text a line)", { rows: 2 }],
  ["thinking", "Thinking", { choices: ["as the template has it", "on", "off"] }],
  ["reasoning_effort", "Reasoning effort", { choices: ["as the template has it", "low", "medium", "high"] }],
  ["tools", "Tools (JSON list, as OpenAI's)", { rows: 4 }],
  ["tool_choice", "Tool choice", { choices: ["auto", "required", "none"] }],
];

let values = JSON.parse(localStorage.getItem(STORE) ?? "{}");

/** The fields of a request that say how to answer. Throws an Error for tools that are no JSON list. */
export function parameters() {
  const body = {};
  for (const [name, , kind] of FIELDS) {
    if (kind.step && values[name] !== undefined) body[name] = Number(values[name]);
  }
  if (values.stop) body.stop = values.stop.split("\n").filter(Boolean);
  if (values.thinking) {
    const on = values.thinking === "on";
    body.chat_template_kwargs = { enable_thinking: on, thinking: on };
  }
  if (values.reasoning_effort) body.reasoning_effort = values.reasoning_effort;
  if (values.tools?.trim()) {
    body.tools = toolsOf(values.tools);
    if (values.tool_choice) body.tool_choice = values.tool_choice;
  }
  return body;
}

export const systemPrompt = () => values.system?.trim() ?? "";

function toolsOf(text) {
  let tools;
  try {
    tools = JSON.parse(text);
  } catch (error) {
    throw new Error(`Settings, tools: ${error.message}`);
  }
  if (!Array.isArray(tools)) throw new Error("Settings, tools: this is no list");
  return tools;
}

function field([name, label, kind]) {
  let input;
  if (kind.choices) {
    input = el("select", {}, ...kind.choices.map((choice, i) => el("option", { value: i ? choice : "" }, choice)));
  } else if (kind.rows) {
    input = el("textarea", { rows: kind.rows, spellcheck: "false" });
  } else {
    input = el("input", { type: "number", min: kind.min, max: kind.max, step: kind.step, placeholder: "server's default" });
  }
  input.id = `set-${name}`;
  input.name = name;
  input.value = values[name] ?? "";
  input.addEventListener("input", () => keep(name, input));
  const note = el("small", { class: "wrong", role: "alert" });
  return el("label", { class: kind.rows ? "wide" : "" }, label, input, note);
}

function keep(name, input) {
  const note = input.nextSibling;
  note.textContent = input.validity.valid ? "" : input.validationMessage;
  if (name === "tools" && input.value.trim()) {
    try {
      toolsOf(input.value);
    } catch (error) {
      note.textContent = error.message;
    }
  }
  if (!input.validity.valid) return;
  if (input.value === "") delete values[name];
  else values[name] = input.value;
  localStorage.setItem(STORE, JSON.stringify(values));
}

function show() {
  $("fields").replaceChildren(...FIELDS.map(field));
}

export function setUp() {
  show();
  $("settings-open").addEventListener("click", () => $("settings").showModal());
  $("settings-close").addEventListener("click", () => $("settings").close());
  $("settings-reset").addEventListener("click", () => {
    values = {};
    localStorage.removeItem(STORE);
    show();
  });
}
