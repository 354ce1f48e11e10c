// What the server does now: figures, two minutes of curves, and the latest requests with their phases.

import { $, el, svg } from "./dom.js";

const KEPT = 120; // samples, one a second
const SHOWN = 25; // requests
const GAP = 10; // seconds without a sample, after which the curves begin anew

let before = null; // the answer before the latest
const samples = [];

export function update(now) {
  if (before && now.uptime < before.uptime) startOver(); // another server
  if (before && now.uptime - before.uptime > GAP) startOver(); // nobody looked for a while
  samples.push(sample(now));
  if (samples.length > KEPT) samples.shift();
  before = now;
  if ($("dashboard").hidden) return;
  drawTiles(now);
  drawCharts();
  drawRequests(now);
  drawAbout(now);
}

function startOver() {
  before = null;
  samples.length = 0;
}

/** Counts since the sample before, as rates. */
function sample(now) {
  const passed = before ? now.uptime - before.uptime : 0;
  const rate = (count) => (passed > 0 ? Math.max(0, count(now) - count(before)) / passed : 0);
  return {
    generated: rate((x) => x.generated_tokens),
    prompt: rate((x) => x.stats.prefill_tokens),
    running: now.stats.num_running,
    waiting: now.stats.num_waiting,
    active: active(now.stats),
    cached: now.stats.slots_evictable / (now.stats.slots_total || 1),
  };
}

/** The share of slots that running requests hold and nobody else may have: what is cached gives way. */
function active({ slots_total, slots_free, slots_evictable }) {
  return (slots_total - slots_free - slots_evictable) / (slots_total || 1);
}

/** The mean of the last seconds: a figure that jumps each second can't be read. */
const lately = (name) => samples.slice(-3).reduce((sum, x) => sum + x[name], 0) / Math.min(3, samples.length);

// --- figures ---

function drawTiles(now) {
  const { stats, info, latency } = now;
  const { active, cached } = samples.at(-1);
  const hit = stats.prompt_tokens ? stats.cached_tokens / stats.prompt_tokens : null;
  const graphic = el("div", { class: "meter", role: "img", "aria-label": `${percent(active)} of the slots in use, ${percent(cached)} cached` });
  for (const [name, share] of [["active", active], ["cached", cached]]) {
    const part = el("i", { class: name });
    part.style.width = `${100 * share}%`;
    graphic.append(part);
  }
  $("tiles").replaceChildren(
    tile("Running", count(stats.num_running), `${count(stats.num_waiting)} waiting`),
    tile("Tokens/s", count(lately("generated")), `${count(lately("prompt"))} of prompts`),
    tile("Slots in use", percent(active), `${percent(cached)} cached, of ${count(stats.slots_total)}`, graphic),
    tile("Cache hit rate", hit === null ? "–" : percent(hit), `${count(stats.cached_tokens)} of ${count(stats.prompt_tokens)} prompt tokens`),
    tile("First token", time(latency.first_token.p50), `95 %: ${time(latency.first_token.p95)}`),
    tile("Next token", time(latency.next_token.p50), `95 %: ${time(latency.next_token.p95)}`),
    tile("Memory", bytes(stats.memory_bytes), `at most ${bytes(stats.memory_peak_bytes)}, weights ${bytes(info.weight_bytes)}, pool ${bytes(info.pool_bytes)}`),
  );
}

function tile(name, value, more, graphic = null) {
  return el("div", { class: "tile" }, el("h3", {}, name), el("b", {}, value), graphic, el("small", { class: "quiet" }, more));
}

// --- curves ---

function drawCharts() {
  $("charts").replaceChildren(
    chart("Tokens/s", [["generated", "generated"], ["prompt", "prompts"]], count),
    chart("Requests", [["running", "running"], ["waiting", "waiting"]], count),
    chart("Slots", [["cached", "cached"], ["active", "in use"]], percent, 1),
  );
}

const WIDTH = KEPT - 1;
const HEIGHT = 40;

function chart(title, lines, format, top = null) {
  const most = top ?? (Math.max(...samples.flatMap((x) => lines.map(([name]) => x[name]))) || 1);
  const plot = svg("svg", { viewBox: `0 -1 ${WIDTH} ${HEIGHT + 2}`, preserveAspectRatio: "none", role: "img", "aria-label": `${title}, last two minutes` });
  for (const y of [0, HEIGHT / 2, HEIGHT]) plot.append(svg("line", { x1: 0, x2: WIDTH, y1: y, y2: y, class: "grid" }));
  lines.forEach(([name], i) => plot.append(svg("polyline", { points: points(name, most), class: `line${i}` })));
  const legend = el("figcaption", {}, title, ...lines.map(([name, label], i) =>
    el("span", { class: `line${i}` }, `${label} ${format(samples.at(-1)[name])}`)));
  const times = el("div", { class: "times quiet" }, el("span", {}, "2 min ago"), el("span", {}, "now"));
  return el("figure", {}, legend, el("div", { class: "plot" }, el("small", { class: "quiet" }, format(most)), plot), times);
}

function points(name, most) {
  const begin = KEPT - samples.length;
  return samples.map((x, i) => `${begin + i},${(HEIGHT * (1 - x[name] / most)).toFixed(2)}`).join(" ");
}

// --- requests ---

function drawRequests(now) {
  const shown = now.requests.slice(0, SHOWN);
  const lasted = (x) => x.end ?? now.time - x.at;
  const longest = Math.max(...shown.map(lasted), 1e-9);
  const rows = shown.map((request) => row(request, lasted(request), longest));
  if (!rows.length) rows.push(el("tr", {}, el("td", { colspan: 9, class: "quiet" }, "None yet.")));
  $("requests").tBodies[0].replaceChildren(...rows);
}

function row(request, lasted, longest) {
  const { first, generated, cached, prompt, outcome } = request;
  const rate = first !== null && generated > request.answers ? (generated - request.answers) / (lasted - first) : null;
  const cells = [
    ["Came", new Date(request.at * 1000).toLocaleTimeString()],
    ["Prompt", count(prompt)],
    ["Cached", count(cached)],
    ["Generated", count(generated)],
    ["Phases", phases(request, lasted, longest)],
    ["First token", time(first)],
    ["Total", time(lasted)],
    ["Tokens/s", rate === null ? "–" : count(rate)],
    ["Ended", outcome ?? "running"],
  ];
  const line = el("tr", { title: request.id, class: outcome ? "" : "live" });
  for (const [name, value] of cells) line.append(el("td", { "data-name": name, class: name === "Phases" ? "wide" : "" }, value));
  return line;
}

/** A bar as long as the request took: in the queue, reading the prompt, answering. */
function phases({ queue, first }, lasted, longest) {
  const waited = first === null ? lasted : queue;
  const parts = [["queue", waited], ["prefill", first === null ? 0 : first - waited], ["decode", first === null ? 0 : lasted - first]];
  const told = first === null ? `waits for its first token since ${time(lasted)}` : parts.map(([name, x]) => `${name} ${time(x)}`).join(", ");
  const bar = el("div", { class: "phases", role: "img", "aria-label": told, title: told });
  for (const [name, length] of parts) {
    const part = el("i", { class: name });
    part.style.width = `${(100 * length) / longest}%`;
    bar.append(part);
  }
  return bar;
}

function drawAbout({ version, model, info, uptime, stats }) {
  const facts = [
    ["Model", model], ["Kind", `${info.model_type}, ${info.dtype}${info.quantization ? `, ${info.quantization}` : ""}`],
    ["Context", `${count(info.context_length)} tokens`], ["Device", info.device],
    ["Attention", info.attention_backend], ["Runs at once", count(info.max_running_requests)],
    ["Steps", `${count(stats.steps)}, ${time(stats.steps ? stats.step_seconds / stats.steps : null)} each`],
    ["Retracted", count(stats.retractions)], ["Up for", time(uptime)], ["Pippin", version],
  ];
  $("about").replaceChildren(...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)))));
}

// --- numbers as text ---

const count = (x) => (x >= 1e6 ? `${(x / 1e6).toFixed(1)} M` : Math.round(x).toLocaleString("en"));
const percent = (x) => `${(100 * (x || 0)).toFixed(x > 0 && x < 0.1 ? 1 : 0)} %`;

function time(x) {
  if (x === null || x === undefined) return "–";
  if (x < 1) return `${(1000 * x).toFixed(x < 0.01 ? 1 : 0)} ms`;
  if (x < 120) return `${x.toFixed(x < 10 ? 2 : 0)} s`;
  return x < 7200 ? `${Math.round(x / 60)} min` : `${Math.round(x / 3600)} h`;
}

function bytes(x) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (x < 1000) return `${x.toFixed(x < 10 && unit !== "B" ? 1 : 0)} ${unit}`;
    x /= 1000;
  }
  return `${x.toFixed(1)} TB`;
}
