"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const page = document.getElementById("page"), tip = document.getElementById("tip");
const STATES = ["gone", "skipped", "read", "ran"];

for (const button of document.querySelectorAll(".switch button")) {
  button.addEventListener("click", () => {
    page.dataset.mode = button.dataset.mode;
    for (const other of document.querySelectorAll(".switch button")) other.setAttribute("aria-pressed", String(other === button));
  });
}

function node(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

/* "0–2, 5 ran; 3–4 skipped" of a string of states, one digit a layer. */
function words(states) {
  return STATES.map((name, state) => {
    const runs = [];
    [...states].forEach((s, layer) => {
      if (Number(s) !== state) return;
      const last = runs[runs.length - 1];
      if (last && last[1] === layer - 1) last[1] = layer; else runs.push([layer, layer]);
    });
    return runs.length ? name + " " + runs.map(([a, b]) => (a === b ? a : a + "–" + b)).join(", ") : "";
  }).filter(Boolean).reverse().join("; ");
}

function fill(token) {
  const pattern = data.patterns[token.pattern];
  tip.replaceChildren(node("b", JSON.stringify(token.text.replaceAll("⏎", ""))), document.createTextNode("  " + token.kind));
  const grid = node("div", undefined, "grid");
  grid.style.gridTemplateColumns = "5.2em repeat(" + data.layers + ", 1fr)";
  for (const [name, states] of [["attention", pattern.attention], ["MLP", pattern.mlp]]) {
    grid.append(node("span", name));
    for (const state of states) grid.append(node("i", undefined, "s" + state));
  }
  tip.append(grid, node("div", "attention: " + words(pattern.attention), "words"), node("div", "MLP: " + words(pattern.mlp), "words"));
  if (token.dense === null) {
    tip.append(node("div", "first of its window: not predicted"));
  } else {
    const added = token.planned - token.dense;
    tip.append(node("div", token.dense.toFixed(2) + " → " + token.planned.toFixed(2) + " nats (" + (added < 0 ? "−" : "+") + Math.abs(added).toFixed(2) + ")"));
  }
}

let shown = null;
function show(span) {
  if (shown) shown.classList.remove("on");
  shown = span;
  tip.hidden = !span;
  if (!span) return;
  span.classList.add("on");
  fill(data.tokens[Number(span.dataset.i)]);
  const at = span.getClientRects()[0], width = tip.offsetWidth;
  const left = Math.max(8, Math.min(at.left, document.documentElement.clientWidth - width - 8));
  const below = at.bottom + tip.offsetHeight + 12 < window.innerHeight;
  tip.style.left = left + window.scrollX + "px";
  tip.style.top = (below ? at.bottom + 6 : at.top - tip.offsetHeight - 6) + window.scrollY + "px";
}
page.addEventListener("pointerover", (event) => show(event.target.closest(".t")));
page.addEventListener("pointerleave", () => show(null));
page.addEventListener("scroll", () => show(null));
