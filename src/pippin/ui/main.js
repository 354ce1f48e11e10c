// Which page is shown, the theme, the key, and whether there is a server to talk to.

import { getStats, setKey } from "./api.js";
import * as chat from "./chat.js";
import * as dashboard from "./dashboard.js";
import { $ } from "./dom.js";
import * as settings from "./settings.js";

const THEME = "pippin.theme";

function showPage() {
  const page = location.hash === "#dashboard" ? "dashboard" : "chat";
  for (const name of ["chat", "dashboard"]) $(name).hidden = name !== page;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${page}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = page === "chat" ? "Pippin" : "Pippin: dashboard";
  if (page === "chat") $("prompt").focus();
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
}

function otherTheme() {
  const now = document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  const theme = now === "dark" ? "light" : "dark";
  localStorage.setItem(THEME, theme);
  setTheme(theme);
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function askForKey() {
  if ($("key").open) return;
  $("key").showModal();
}

function useKey() {
  setKey($("key-value").value.trim());
  $("key").close();
}

/** Looks at the server once a second while anybody looks at the page. */
async function watch() {
  for (;;) {
    if (!document.hidden && !$("key").open) await look();
    await new Promise((done) => setTimeout(done, 1000));
  }
}

async function look() {
  try {
    const stats = await getStats();
    notice("");
    $("model").textContent = stats.model;
    $("model").title = `${stats.model}, ${stats.info.dtype}, ${stats.info.device}`;
    dashboard.update(stats);
  } catch (error) {
    if (error.status === 401) askForKey();
    else notice(error.message[0].toUpperCase() + error.message.slice(1));
  }
}

function onKey(event) {
  const writing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
  if (event.key === "/" && !writing && !document.querySelector("dialog[open]")) {
    location.hash = "#chat";
    $("prompt").focus();
  } else if (event.altKey && event.code === "KeyN") chat.clear();
  else if (event.altKey && event.code === "KeyS") $("settings").showModal();
  else if (event.key === "Escape" && !document.querySelector("dialog[open]")) return chat.stop();
  else return;
  event.preventDefault();
}

setTheme(localStorage.getItem(THEME));
$("theme").addEventListener("click", otherTheme);
$("key-use").addEventListener("click", useKey);
$("key-value").addEventListener("keydown", (event) => event.key === "Enter" && useKey());
addEventListener("hashchange", showPage);
addEventListener("keydown", onKey);
settings.setUp();
chat.setUp();
showPage();
watch();
