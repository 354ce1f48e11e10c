// The conversation: what was said, an answer as it streams, and what can be done about it.

import { chatChunks } from "./api.js";
import { $, el } from "./dom.js";
import { copier, render } from "./markdown.js";
import { parameters, systemPrompt } from "./settings.js";

const STORE = "pippin.conversation"; // of this tab, so that a reload loses nothing
const NEAR_END = 60; // pixels: who has scrolled up further is not pulled down again

// Messages as the API has them. Those of the assistant also have `meta`: figures, how it ended, an error.
let messages = JSON.parse(sessionStorage.getItem(STORE) ?? "[]");
let running = null; // the AbortController of the answer that streams

// --- what is asked ---

function body() {
  const system = systemPrompt();
  const told = messages.filter((message) => message.role !== "assistant" || said(message));
  return { ...parameters(), messages: [...(system ? [{ role: "system", content: system }] : []), ...told.map(plain)] };
}

const said = (message) => message.content || message.reasoning_content || message.tool_calls?.length;

function plain({ meta, ...message }) {
  const { reasoning_content, tool_calls, ...rest } = message;
  return { ...rest, ...(reasoning_content && { reasoning_content }), ...(tool_calls?.length && { tool_calls }) };
}

// --- an answer ---

async function answer() {
  if (running) return;
  const meta = { began: performance.now() };
  const message = { role: "assistant", content: "", reasoning_content: "", tool_calls: [], meta };
  running = new AbortController();
  busy(true);
  let view;
  try {
    const asked = body();
    messages.push(message);
    view = show(message);
    for await (const chunk of chatChunks(asked, running.signal)) {
      take(message, chunk);
      view.soon();
    }
  } catch (error) {
    if (error.name === "AbortError") meta.finish = "stopped";
    else meta.error = error.message;
    if (!view) {
      messages.push(message);
      view = show(message);
    }
  } finally {
    running = null;
    meta.seconds = (performance.now() - meta.began) / 1000;
    message.tool_calls = message.tool_calls.filter((call) => call.function.name);
    keep();
    view.end();
    busy(false);
  }
}

function take(message, chunk) {
  const { meta } = message;
  if (chunk.usage) meta.usage = chunk.usage;
  const choice = chunk.choices[0];
  if (!choice) return;
  const { content, reasoning_content, tool_calls } = choice.delta;
  const now = performance.now();
  if (reasoning_content || content || tool_calls) meta.first ??= now - meta.began;
  if (chunk.usage?.completion_tokens) {
    meta.firstTokens ??= chunk.usage.completion_tokens;
    meta.firstAt ??= now;
    meta.lastAt = now;
  }
  if (reasoning_content) message.reasoning_content += reasoning_content;
  if (message.reasoning_content && (content || tool_calls)) meta.thought ??= now - meta.began;
  if (content) message.content += content;
  for (const part of tool_calls ?? []) takeCall(message.tool_calls, part);
  if (choice.finish_reason) meta.finish = choice.finish_reason;
}

function takeCall(calls, part) {
  const call = (calls[part.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
  if (part.id) call.id = part.id;
  if (part.function?.name) call.function.name = part.function.name;
  call.function.arguments += part.function?.arguments ?? "";
}

export function stop() {
  running?.abort();
}

// --- how it looks ---

function show(message) {
  const view = message.role === "assistant" ? new AnswerView(message) : { node: saidView(message), soon() {}, end() {} };
  $("messages").append(view.node);
  $("empty").hidden = true;
  toEnd(true);
  return view;
}

function saidView(message) {
  const tool = message.role === "tool";
  const text = el("div", { class: "text" }, message.content);
  const actions = el("div", { class: "actions" }, copier(() => message.content));
  if (!tool) actions.append(el("button", { type: "button", class: "plain", onclick: () => edit(message) }, "Edit"));
  return el("article", { class: `message ${message.role}`, "aria-label": tool ? "Result of a tool" : "You" }, text, actions);
}

class AnswerView {
  constructor(message) {
    this.message = message;
    this.thoughts = el("div", { class: "text" });
    this.summary = el("summary");
    this.reasoning = el("details", { class: "reasoning", hidden: true, open: true }, this.summary, this.thoughts);
    this.content = el("div", { class: "content" });
    this.calls = el("div", { class: "calls" });
    this.error = el("p", { class: "error", role: "alert", hidden: true });
    this.figures = el("span", { class: "figures quiet" });
    this.again = el("button", { type: "button", class: "plain again", onclick: () => regenerate(message) }, "Regenerate");
    const actions = el("div", { class: "actions" }, copier(() => message.content), this.again, this.figures);
    const parts = [this.reasoning, this.content, this.calls, this.error, actions];
    this.node = el("article", { class: "message assistant streaming", "aria-label": "Answer", "aria-busy": "true" }, ...parts);
    this.pause = 0;
  }

  /** Drawn again before long: a long answer is drawn less often, so that drawing never takes most of the time. */
  soon() {
    this.timer ??= setTimeout(() => {
      this.timer = null;
      const began = performance.now();
      const follow = atEnd();
      this.draw();
      if (follow) toEnd();
      this.pause = Math.max(30, 3 * (performance.now() - began));
    }, this.pause);
  }

  end() {
    clearTimeout(this.timer);
    const follow = atEnd();
    this.node.classList.remove("streaming");
    this.node.removeAttribute("aria-busy");
    this.reasoning.open = false;
    this.draw();
    if (follow) toEnd(true);
  }

  draw() {
    const { content, reasoning_content, meta } = this.message;
    this.drawReasoning(reasoning_content, meta);
    if (this.drawn !== content) this.content.replaceChildren(render(content));
    this.drawn = content;
    this.drawCalls();
    this.error.textContent = meta.error ?? "";
    this.error.hidden = !meta.error;
    this.figures.textContent = figures(meta);
  }

  drawReasoning(text, meta) {
    this.reasoning.hidden = !text;
    if (this.thoughts.textContent !== text) this.thoughts.textContent = text;
    if (meta.thought && !this.closed) {
      this.closed = true; // once: who opens it again may read on
      this.reasoning.open = false;
    }
    this.summary.textContent = meta.thought ? `Thought for ${seconds(meta.thought / 1000)}` : running ? "Thinking…" : "Thoughts";
  }

  drawCalls() {
    const calls = this.message.tool_calls;
    const state = JSON.stringify(calls) + !!running;
    if (this.state === state) return;
    this.state = state;
    this.calls.replaceChildren(...calls.filter(Boolean).map(callView));
    if (calls.length && !running && messages.at(-1) === this.message) this.calls.append(resultsForm(calls));
  }
}

function callView(call) {
  let shown = call.function.arguments;
  try {
    shown = JSON.stringify(JSON.parse(shown), null, 2);
  } catch {
    // Not whole yet, or not JSON: shown as it came.
  }
  return el("div", { class: "call" }, el("b", {}, call.function.name), el("pre", {}, shown));
}

/** Where the user says what the tools returned. */
function resultsForm(calls) {
  const inputs = calls.map((call) => el("textarea", { rows: 2, "aria-label": `Result of ${call.function.name}` }));
  const labels = calls.map((call, i) => el("label", {}, `Result of ${call.function.name}`, inputs[i]));
  const form = el("form", { class: "results", onsubmit: send }, ...labels, el("button", { class: "main" }, "Send results"));
  function send(event) {
    event.preventDefault();
    form.remove();
    calls.forEach((call, i) => add({ role: "tool", tool_call_id: call.id, content: inputs[i].value }));
    answer();
  }
  return form;
}

const ENDINGS = { stop: "", length: "reached the limit", tool_calls: "", stopped: "stopped", content_filter: "filtered" };

function figures(meta) {
  const { usage } = meta;
  const parts = [];
  if (usage) {
    const after = usage.completion_tokens - meta.firstTokens;
    const rate = after > 0 ? after / ((meta.lastAt - meta.firstAt) / 1000) : 0;
    parts.push(`${usage.completion_tokens} tokens`);
    if (rate) parts.push(`${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`);
    if (meta.first) parts.push(`first after ${seconds(meta.first / 1000)}`);
    parts.push(`prompt ${usage.prompt_tokens}, ${usage.prompt_tokens_details?.cached_tokens ?? 0} cached`);
  }
  const ending = ENDINGS[meta.finish] ?? meta.finish;
  return [...parts, ...(ending ? [ending] : [])].join(" · ");
}

const seconds = (value) => (value < 10 ? `${value.toFixed(value < 1 ? 2 : 1)} s` : `${Math.round(value)} s`);

const atEnd = () => $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < NEAR_END;

function toEnd(always = false) {
  if (always || running) $("scroll").scrollTop = $("scroll").scrollHeight;
}

// --- what the user does ---

function add(message) {
  messages.push(message);
  keep();
  show(message);
}

function send(event) {
  event?.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || running) return;
  $("prompt").value = "";
  grow();
  say(text);
}

function say(text) {
  add({ role: "user", content: text });
  answer();
}

function regenerate(message) {
  if (running) return;
  messages = messages.slice(0, messages.indexOf(message));
  redraw();
  answer();
}

function edit(message) {
  if (running) return;
  messages = messages.slice(0, messages.indexOf(message));
  $("prompt").value = message.content;
  redraw();
  grow();
  $("prompt").focus();
}

export function clear() {
  stop();
  messages = [];
  redraw();
  $("prompt").focus();
}

function keep() {
  try {
    sessionStorage.setItem(STORE, JSON.stringify(messages));
  } catch {
    // Longer than a browser keeps: it is there until the page is closed.
  }
}

function redraw() {
  keep();
  $("messages").replaceChildren();
  $("empty").hidden = false;
  for (const message of messages) show(message).end();
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  $("chat").classList.toggle("busy", is);
}

/** The input is as high as its text, up to a third of the window. */
function grow() {
  const input = $("prompt");
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight + 2, innerHeight / 3)}px`;
}

export function setUp() {
  $("composer").addEventListener("submit", send);
  $("stop").addEventListener("click", stop);
  $("new").addEventListener("click", clear);
  for (const starter of $("starters").children) starter.addEventListener("click", () => say(starter.textContent));
  $("prompt").addEventListener("input", grow);
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  });
  redraw();
}
