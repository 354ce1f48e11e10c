// A model's words to elements. They are not to be trusted: no HTML of theirs is kept, and what markdown makes of them is
// sanitised, with few tags, no pictures (a picture is a request to whoever its address names) and no links into this server.

import "./vendor/markdown-it.min.js";
import "./vendor/purify.min.js";
import hljs from "./vendor/highlight.min.js";
import { el } from "./dom.js";

const { markdownit, DOMPurify } = globalThis;

const MOST_HIGHLIGHTED = 50_000; // characters of a code block; longer ones are shown plain

const markdown = markdownit({ html: false, linkify: true, breaks: true, highlight }).disable("image");
markdown.linkify.set({ fuzzyLink: false, fuzzyEmail: false });

function highlight(code, language) {
  if (code.length > MOST_HIGHLIGHTED || !hljs.getLanguage(language)) return "";
  return hljs.highlight(code, { language, ignoreIllegals: true }).value;
}

// Tables say how columns are aligned in style attributes, which the page's policy forbids.
for (const rule of ["th_open", "td_open"]) {
  markdown.renderer.rules[rule] = (tokens, i, options, env, self) => {
    const align = /right|center/.exec(tokens[i].attrGet("style") ?? "");
    tokens[i].attrs = align ? [["class", `align-${align[0]}`]] : null;
    return self.renderToken(tokens, i, options);
  };
}

const RULES = {
  ALLOWED_TAGS: ["p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "pre", "code", "span",
    "em", "strong", "s", "a", "table", "thead", "tbody", "tr", "th", "td"],
  ALLOWED_ATTR: ["href", "class", "start"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.hasAttribute?.("class") && !/^(hljs|language-|align-)/.test(node.className)) node.removeAttribute("class");
  if (node.tagName !== "A") return;
  if (!outward(node.getAttribute("href"))) return node.removeAttribute("href");
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
});

/** Whether a link leads to another site, or to a mail program. */
function outward(href) {
  if (!URL.canParse(href ?? "")) return false;
  const url = new URL(href);
  return url.protocol === "mailto:" || (/^https?:$/.test(url.protocol) && url.host !== location.host);
}

/** Markdown as a fragment to insert. */
export function render(text) {
  const fragment = DOMPurify.sanitize(markdown.render(text), RULES);
  for (const pre of fragment.querySelectorAll("pre")) framed(pre);
  for (const table of fragment.querySelectorAll("table")) {
    const box = el("div", { class: "table", tabindex: 0 });
    table.replaceWith(box);
    box.append(table);
  }
  return fragment;
}

/** A code block, with its language and a button that copies it. */
function framed(pre) {
  const language = /language-([\w+#-]+)/.exec(pre.querySelector("code")?.className ?? "")?.[1] ?? "";
  const box = el("div", { class: "code" }, el("div", { class: "bar" }, el("span", {}, language), copier(() => pre.textContent)));
  pre.setAttribute("tabindex", 0);
  pre.replaceWith(box);
  box.append(pre);
}

/** A button that copies what `text` returns. */
export function copier(text) {
  const button = el("button", { type: "button", class: "plain copy", onclick: copy }, "Copy");
  async function copy() {
    await navigator.clipboard?.writeText(text());
    button.textContent = navigator.clipboard ? "Copied" : "No clipboard here";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  }
  return button;
}
