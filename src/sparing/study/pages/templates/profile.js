"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const STATES = ["gone", "skipped", "read", "ran"];

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

/* What became of a token in every layer, as a grid and in words. */
function layers(pattern) {
  const grid = node("div", undefined, "grid");
  grid.style.gridTemplateColumns = "5.2em repeat(" + data.layers + ", 1fr)";
  for (const [name, states] of [["attention", pattern.attention], ["MLP", pattern.mlp]]) {
    grid.append(node("span", name));
    for (const state of states) grid.append(node("i", undefined, "s" + state));
  }
  return [grid, node("div", "attention: " + words(pattern.attention), "words"), node("div", "MLP: " + words(pattern.mlp), "words")];
}

function surprise(token) {
  const added = token.planned - token.dense;
  return node("div", token.dense.toFixed(2) + " → " + token.planned.toFixed(2) + " nats (" + (added < 0 ? "−" : "+") + Math.abs(added).toFixed(2) + ")");
}

/* Next to a rectangle of the window. */
function place(at) {
  const width = tip.offsetWidth;
  const left = Math.max(8, Math.min(at.left, document.documentElement.clientWidth - width - 8));
  const below = at.bottom + tip.offsetHeight + 12 < window.innerHeight;
  tip.style.left = left + window.scrollX + "px";
  tip.style.top = (below ? at.bottom + 6 : at.top - tip.offsetHeight - 6) + window.scrollY + "px";
}

function press(button, group) {
  for (const other of group) other.setAttribute("aria-pressed", String(other === button));
}
