"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const el = (id) => document.getElementById(id);
const stage = el("stage"), svg = el("grid"), heat = el("heat"), picture = el("picture"), input = el("word"), list = el("found");
const SVG = "http://www.w3.org/2000/svg", CELL = 20, WRITTEN = 1300, K = 255;
const state = { grid: 0, level: 0, lens: 0, mode: "classes", word: -1, at: 0, pinned: -1, original: false };

/* Text goes in as text only: words of a tokenizer and names of files come from anywhere. */
function node(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined && text !== null) made.textContent = text;
  if (name) made.className = name;
  return made;
}
function drawn(tag, attributes, parent) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (parent) parent.append(made);
  return made;
}
/* A word that can be seen: spaces and line breaks as signs. */
const visible = (word) => (word === "" ? "∅" : word.replace(/^ +| +$/g, (s) => "␣".repeat(s.length)).replace(/\n/g, "⏎").replace(/\t/g, "⇥"));
const number = (value, digits = 3) => (Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(digits)))).replace("-", "−");

/* Readings are unpacked a level at a time, when first asked for. */
function bytes(text) {
  const raw = atob(text), out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out;
}
const kept = new Map();
function once(key, make) {
  if (!kept.has(key)) kept.set(key, make());
  return kept.get(key);
}
const wide = (raw) => (data.wide === 2 ? new Uint16Array(raw.buffer) : new Uint32Array(raw.buffer));
const ids = (lens, level) => once("i" + lens + "," + level, () => wide(bytes(data.lenses[lens].ids[level])));
const codes = (lens, level) => once("s" + lens + "," + level, () => bytes(data.lenses[lens].scores[level]));
const norms = (level) => once("n" + level, () => new Float32Array(bytes(data.norms[level]).buffer));
const maps = (level) => once("m" + level, () => bytes(data.maps.scores[level]));
const kinds = bytes(data.of), k = ids(0, 0).length / data.n;
function tops(lens, level, token) {
  const [low, high] = data.lenses[lens].ranges[level], words = ids(lens, level), scores = codes(lens, level);
  return Array.from({ length: k }, (_, i) => ({ word: words[token * k + i], score: low + (scores[token * k + i] * (high - low)) / K }));
}
const logs = (lens) => data.lenses[lens].unit.startsWith("log");
const said = (lens, score, digits) => (logs(lens) ? number(100 * Math.exp(score), 2) + "%" : score.toFixed(digits).replace("-", "−"));
const share = (lens, level, score) => {
  const [low, high] = data.lenses[lens].ranges[level];
  return logs(lens) ? Math.exp(score) : high > low ? Math.max(0, score - Math.min(low, 0)) / (high - Math.min(low, 0)) : 0;
};
const range = once("norms", () => {
  let low = Infinity, high = 0;
  data.norms.forEach((_, level) => norms(level).forEach((v) => { if (v > 0 && v < low) low = v; if (v > high) high = v; }));
  return [Math.log(low), Math.log(high)];
});

/* Where each token is: which grid, which cell, or what beside a grid. */
const homes = [];
data.grids.forEach((grid, g) => {
  grid.places.forEach((row, r) => row.forEach((token, c) => { if (token >= 0) homes[token] = { grid: g, row: r, column: c }; }));
  grid.extra.forEach(([token, label]) => { homes[token] = { grid: g, label }; });
});
const title = (token) => { const home = homes[token]; return home.label || "row " + (home.row + 1) + ", column " + (home.column + 1); };
const cells = (grid) => [grid.places.length, grid.places[0].length];

/* One colour for one value: dark to light, told apart by anyone. */
const STOPS = [[13, 8, 58], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];
function ramp(share) {
  const x = Math.max(0, Math.min(1, share)) * (STOPS.length - 1), i = Math.min(STOPS.length - 2, Math.floor(x));
  return STOPS[i].map((from, j) => Math.round(from + (STOPS[i + 1][j] - from) * (x - i)));
}

/* What the heat map shows: a value for each token or nothing, its ends, and words that say what it is. */
function values() {
  const at = "level " + data.levels[state.level];
  if (state.mode === "norm") {
    const found = Array.from(norms(state.level), (v) => Math.log(Math.max(v, 1e-12)));
    const low = Math.min(...found), high = Math.max(...found);
    return { found, low, high, ends: [number(Math.exp(low)), number(Math.exp(high))], what: "norm of the state at " + at + ", logarithmic", show: (v) => number(Math.exp(v)) };
  }
  const known = data.maps.words.indexOf(state.word), word = visible(data.words[state.word]);
  if (known >= 0) {
    let low = Infinity, high = -Infinity;
    data.maps.ranges.forEach((level) => { low = Math.min(low, level[known][0]); high = Math.max(high, level[known][1]); });
    const [from, to] = data.maps.ranges[state.level][known], raw = maps(state.level).subarray(known * data.n, (known + 1) * data.n);
    return { found: Array.from(raw, (c) => from + (c * (to - from)) / K), low, high, ends: [number(low), number(high)], what: "cosine to the embedding of “" + word + "” at " + at + "; one scale for all levels", show: number };
  }
  const lens = data.lenses[state.lens], found = new Array(data.n).fill(null);
  const words = ids(state.lens, state.level), scores = codes(state.lens, state.level), [low, high] = lens.ranges[state.level];
  for (let i = 0; i < words.length; i++) if (words[i] === state.word) found[Math.floor(i / k)] = low + (scores[i] * (high - low)) / K;
  const times = found.filter((v) => v !== null).length;
  return { found, low, high, ends: [number(low), number(high)], what: "“" + word + "” is among the " + k + " best words of " + times + " of " + data.n + " tokens (" + lens.name + ", " + at + "; " + lens.unit + "). Elsewhere its score is not on this page.", show: number };
}

function build() {
  const grid = data.grids[state.grid], [h, w] = cells(grid), [width, height] = grid.size;
  const cw = CELL, ch = (CELL * height * w) / (width * h);
  stage.style.aspectRatio = width + " / " + height;
  stage.style.maxWidth = "calc(78vh * " + width / height + ")";
  picture.src = grid.src;
  picture.alt = grid.name;
  stage.classList.toggle("small", width < 240);
  heat.width = w;
  heat.height = h;
  svg.setAttribute("viewBox", "0 0 " + w * cw + " " + h * ch);
  const defs = drawn("defs", {});
  const pattern = (id, size, turn, path, attributes) => {
    const made = drawn("pattern", { id, width: size, height: size, patternUnits: "userSpaceOnUse", patternTransform: "rotate(" + turn + ")" }, defs);
    drawn("path", { d: path, ...attributes }, made);
  };
  const line = { stroke: "#fff", "stroke-width": 1.1, "stroke-opacity": 0.75 };
  pattern("p-dead", 5, 45, "M0 0V5", line);
  pattern("p-vit_sink", 4, 0, "M2 0V4", line);
  pattern("p-llm_sink", 4, 90, "M2 0V4", line);
  for (const name of ["newline", "other0", "other1", "other2"]) pattern("p-" + name, 5, 0, "M2.5 2.5h.01", { stroke: "#fff", "stroke-width": 1.9, "stroke-linecap": "round", "stroke-opacity": 0.8 });
  const layers = drawn("g", { class: "kinds" });
  data.classes.forEach((one, i) => {
    let path = "";
    const letters = drawn("g", { class: "letters", "font-size": Math.min(cw, ch) * 0.46 });
    grid.places.forEach((row, r) => row.forEach((token, c) => {
      if (token < 0 || kinds[token] !== i) return;
      path += "M" + c * cw + " " + (r * ch).toFixed(3) + "h" + cw + "v" + ch.toFixed(3) + "h" + -cw + "z";
      if (one.letter && h * w <= WRITTEN) drawn("text", { x: (c + 0.5) * cw, y: (r + 0.5) * ch }, letters).textContent = one.letter;
    }));
    if (!path) return;
    const layer = drawn("g", { "data-kind": i, class: "k-" + one.key }, layers);
    drawn("path", { d: path, class: "fill" + (one.key === "alive" ? " light" : "") }, layer);
    if (one.key !== "alive") drawn("path", { d: path, class: "pattern", fill: "url(#p-" + one.key + ")" }, layer);
    layer.append(letters);
  });
  let path = "";
  for (let r = 0; r <= h; r++) path += "M0 " + (r * ch).toFixed(3) + "H" + w * cw;
  for (let c = 0; c <= w; c++) path += "M" + c * cw + " 0V" + (h * ch).toFixed(3);
  svg.replaceChildren(defs, layers, drawn("g", { class: "labels" }), drawn("path", { d: path, class: "lines" }), drawn("g", { class: "marks" }));
  el("extra").hidden = !grid.extra.length;
  el("extra").querySelector(".chips").replaceChildren(...grid.extra.map(([token, label]) => {
    const chip = node("button", label, "k-" + data.classes[kinds[token]].key);
    chip.type = "button";
    chip.dataset.token = token;
    return chip;
  }));
  const before = data.originals[grid.original].size;
  el("size").textContent = width + "×" + height + " pixels" + (before[0] === width && before[1] === height ? "" : ", of " + before[0] + "×" + before[1]) + "; " + h + "×" + w + " tokens";
  pressed("#look .tabs button", (tab) => Number(tab.dataset.grid) === state.grid, "aria-selected");
}

function pressed(which, test, attribute = "aria-pressed") {
  for (const button of document.querySelectorAll(which)) button.setAttribute(attribute, String(test(button)));
}

/* Everything that depends on level, lens, mode and search. */
function paint() {
  const grid = data.grids[state.grid], [h, w] = cells(grid), context = heat.getContext("2d"), labels = svg.querySelector(".labels");
  const searching = state.mode === "search", hot = searching || state.mode === "norm";
  stage.dataset.mode = hot ? "heat" : state.mode;
  svg.querySelector(".kinds").style.display = state.mode === "classes" && !state.original ? "" : "none";
  svg.querySelector(".lines").style.display = el("lines").getAttribute("aria-pressed") === "true" ? "" : "none";
  heat.style.display = (hot || state.mode === "words") && !state.original ? "" : "none";
  labels.replaceChildren();
  context.clearRect(0, 0, w, h);
  el("heat-key").hidden = state.mode === "classes";
  el("classes-key").hidden = state.mode !== "classes";
  el("best").hidden = !searching;
  for (const part of ["low", "ramp", "high"]) el(part).hidden = !hot;
  picture.src = state.original ? data.originals[grid.original].src : grid.src;
  if (hot) {
    const shown = values(), image = context.createImageData(w, h);
    grid.places.forEach((row, r) => row.forEach((token, c) => {
      const value = token < 0 ? null : shown.found[token];
      if (value === null) return;
      const x = shown.high > shown.low ? (value - shown.low) / (shown.high - shown.low) : 1;
      image.data.set([...ramp(x), 255], 4 * (r * w + c));
    }));
    context.putImageData(image, 0, 0);
    el("low").textContent = shown.ends[0];
    el("high").textContent = shown.ends[1];
    el("what").textContent = shown.what;
    if (searching) {
      const order = shown.found.map((v, token) => [v, token]).filter(([v]) => v !== null).sort((a, b) => b[0] - a[0]).slice(0, 5);
      el("best").replaceChildren(node("span", order.length ? "nearest:" : "no token here"), ...order.map(([v, token]) => {
        const button = node("button", (data.grids.length > 1 && homes[token].grid !== state.grid ? data.grids[homes[token].grid].name + ", " : "") + title(token) + "  " + shown.show(v));
        button.type = "button";
        button.dataset.token = token;
        return button;
      }));
    }
  }
  if (state.mode === "words" && !state.original) {
    const few = h * w <= WRITTEN, dark = matchMedia("(prefers-color-scheme: dark)").matches ? [27, 30, 36] : [255, 255, 255];
    const ch = (CELL * grid.size[1] * w) / (grid.size[0] * h), image = context.createImageData(w, h);
    el("what").textContent = few ? "the best word of each token (" + data.lenses[state.lens].name + ", level " + data.levels[state.level] + ")" : "too many patches to write in: point at them";
    if (few) {
      const first = (token) => ids(state.lens, state.level)[token * k], times = new Map();
      grid.places.flat().forEach((token) => { if (token >= 0) times.set(first(token), (times.get(first(token)) || 0) + 1); });
      for (let i = 0; i < h * w; i++) image.data.set([...dark, 255], 4 * i);
      grid.places.forEach((row, r) => row.forEach((token, c) => {
        if (token < 0) return;
        const word = visible(data.words[first(token)]), length = [...word].length;
        const text = drawn("text", { x: (c + 0.5) * CELL, y: (r + 0.5) * ch, "font-size": Math.min(ch * 0.42, (CELL * 1.42) / Math.max(3, length)).toFixed(2), direction: "ltr", class: times.get(first(token)) > 0.2 * h * w ? "common" : "" }, labels);
        text.textContent = length > 14 ? [...word].slice(0, 13).join("") + "…" : word;
      }));
      context.putImageData(image, 0, 0);
    }
  }
  const level = data.levels[state.level];
  el("at").textContent = level;
  el("where-at").textContent = level === 0 ? "of " + data.depth + ", entering layer 0" : level === data.depth ? "of " + data.depth + ", before the norm" : "of " + data.depth + ", after layer " + (level - 1);
  el("level").value = state.level;
  el("level").setAttribute("aria-valuetext", "level " + level);
  pressed("[data-mode]:is(button)", (button) => button.dataset.mode === state.mode);
  pressed("[data-lens]", (button) => Number(button.dataset.lens) === state.lens);
  inspect();
}

/* The patch that is pointed at, the one that is pinned, and both through the levels. */
function inspect() {
  card(el("pointed"), state.at, false);
  el("pinned").hidden = state.pinned < 0;
  if (state.pinned >= 0) card(el("pinned"), state.pinned, true);
  const marks = svg.querySelector(".marks"), grid = data.grids[state.grid], [h, w] = cells(grid), ch = (CELL * grid.size[1] * w) / (grid.size[0] * h);
  marks.replaceChildren();
  const mark = (token, name) => {
    const home = homes[token];
    if (!home || home.grid !== state.grid || home.label) return;
    const group = drawn("g", { class: name }, marks);
    for (const part of ["under", "over"]) drawn("rect", { class: "cursor " + part, x: home.column * CELL, y: home.row * ch, width: CELL, height: ch }, group);
  };
  if (state.pinned >= 0) mark(state.pinned, "pinning");
  mark(state.at, state.at === state.pinned ? "top" : "pointing");
  for (const chip of el("extra").querySelectorAll("button")) chip.classList.toggle("on", Number(chip.dataset.token) === state.at);
  through();
}

function card(into, token, pinned) {
  const kind = data.classes[kinds[token]], head = node("div", null, "head"), name = node("b", title(token), "title");
  const swatch = node("i", kind.letter, "swatch k-" + kind.key), button = node("button", pinned ? "let go" : "pin");
  name.prepend(swatch);
  button.type = "button";
  button.dataset.pin = pinned ? -1 : token;
  head.append(name, button);
  const where = data.grids.length > 1 ? data.grids[homes[token].grid].name + " · " : "";
  const meta = node("p", where + kind.name + " · token " + data.index[token] + " of the prompt · norm " + number(norms(state.level)[token]), "meta");
  const words = node("ol");
  for (const { word, score } of tops(state.lens, state.level, token)) {
    const line = node("li", null, word === state.word && state.mode === "search" ? "sought" : ""), name = node("bdi", visible(data.words[word]));
    name.dataset.word = word;
    name.title = "find it in the picture";
    line.style.setProperty("--w", (100 * share(state.lens, state.level, score)).toFixed(1) + "%");
    line.append(name, node("span", said(state.lens, score, 3)));
    words.append(line);
  }
  into.replaceChildren(head, meta, words);
}

function best(lens, level, token) {
  const [first] = tops(lens, level, token), cell = node("td", null, "top" + (level && ids(lens, level - 1)[token * k] === first.word ? " same" : ""));
  cell.append(node("bdi", visible(data.words[first.word])), node("small", said(lens, first.score, 2)));
  return cell;
}
function through() {
  /* One patch through both lenses, or two through one. */
  const two = state.pinned >= 0 && state.pinned !== state.at, [low, high] = range;
  const columns = two ? [[state.at, [state.lens]], [state.pinned, [state.lens]]] : [[state.at, data.lenses.map((_, i) => i)]];
  const head = node("tr");
  head.append(node("th", "level"));
  for (const [token, lenses] of columns) {
    const name = node("th", two ? (token === state.pinned ? "pinned" : "pointed at") : "norm");
    head.append(name);
    if (two) name.colSpan = 2; else head.append(...lenses.map((lens) => node("th", data.lenses[lens].name)));
  }
  const rows = data.levels.map((level, i) => {
    const row = node("tr", null, i === state.level ? "now" : ""), first = node("th"), go = node("button", level);
    go.type = "button";
    row.dataset.level = i;
    first.scope = "row";
    first.append(go);
    row.append(first);
    for (const [token, lenses] of columns) {
      const norm = norms(i)[token], bar = node("td", null, "bar" + (token === state.pinned ? " p" : "")), inner = node("div"), line = node("i");
      line.style.width = Math.round(3 + 44 * (high > low ? Math.max(0, Math.log(norm) - low) / (high - low) : 1)) + "px";
      inner.append(line, node("span", number(norm)));
      bar.append(inner);
      row.append(bar, ...lenses.map((lens) => best(lens, i, token)));
    }
    return row;
  });
  const table = document.querySelector(".through");
  table.tHead.replaceChildren(head);
  table.tBodies[0].replaceChildren(...rows);
}
/* The level that is shown stays in sight. */
function follow() {
  const box = document.querySelector(".levels-box"), row = box.querySelector("tr.now");
  if (!row) return;
  const top = row.offsetTop - box.querySelector("thead").offsetHeight, bottom = row.offsetTop + row.offsetHeight;
  if (top < box.scrollTop) box.scrollTop = top; else if (bottom > box.scrollTop + box.clientHeight) box.scrollTop = bottom - box.clientHeight;
}

function say() {
  const words = tops(state.lens, state.level, state.at).slice(0, 3).map(({ word }) => visible(data.words[word]));
  el("said").textContent = title(state.at) + ", " + data.classes[kinds[state.at]].name + ": " + words.join(", ");
}
function point(token, aloud) {
  if (token === undefined || token < 0) return;
  state.at = token;
  if (homes[token].grid !== state.grid) { state.grid = homes[token].grid; build(); paint(); } else inspect();
  if (aloud) say();
}
function pin(token) {
  state.pinned = token === state.pinned ? -1 : token;
  inspect();
}
function level(to) {
  state.level = Math.max(0, Math.min(data.levels.length - 1, to));
  paint();
  follow();
}

/* The grid under a pointer and under keys. */
function under(event) {
  const box = svg.getBoundingClientRect(), grid = data.grids[state.grid], [h, w] = cells(grid);
  const c = Math.floor(((event.clientX - box.left) / box.width) * w), r = Math.floor(((event.clientY - box.top) / box.height) * h);
  return r >= 0 && r < h && c >= 0 && c < w ? grid.places[r][c] : -1;
}
svg.addEventListener("pointermove", (event) => {
  const token = under(event);
  if (token >= 0 && token !== state.at) point(token);
});
let touched = -1;
svg.addEventListener("pointerdown", (event) => { touched = event.pointerType === "touch" ? state.at : -1; });
svg.addEventListener("click", (event) => {
  const token = under(event);
  if (token < 0) return;
  /* A finger has no hovering: its first tap points, a second one on the same patch pins. */
  const pointing = event.pointerType === "touch" && touched !== token;
  point(token);
  if (!pointing) pin(token);
});
svg.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const grid = data.grids[state.grid], [h, w] = cells(grid), home = homes[state.at];
  let { row: r = 0, column: c = 0 } = home.grid === state.grid ? home : {};
  if (event.key === "ArrowLeft") c--;
  else if (event.key === "ArrowRight") c++;
  else if (event.key === "ArrowUp") r--;
  else if (event.key === "ArrowDown") r++;
  else if (event.key === "Home") c = 0;
  else if (event.key === "End") c = w - 1;
  else if (event.key === "[" || event.key === "]") { level(state.level + (event.key === "]" ? 1 : -1)); say(); return; }
  else if (event.key === "Enter" || event.key === " ") { event.preventDefault(); pin(state.at); return; }
  else if (event.key === "Escape") { state.pinned = -1; inspect(); return; }
  else return;
  event.preventDefault();
  point(grid.places[Math.max(0, Math.min(h - 1, r))][Math.max(0, Math.min(w - 1, c))], true);
});

/* Search: words that are on every patch's map first, then those that are some patch's best. */
const lowered = () => once("lowered", () => data.words.map((word) => word.trim().toLowerCase()));
const everywhere = new Set(data.maps.words);
let marked = -1;
function suggest() {
  const typed = input.value.trim().toLowerCase(), found = [[], [], [], []], plain = lowered();
  const consider = (word) => {
    const rank = plain[word] === typed ? 0 : plain[word].startsWith(typed) ? 1 : plain[word].includes(typed) ? 2 : 3;
    if (rank < 3) found[rank].push(word);
  };
  if (!typed) found[0] = data.maps.words.slice(0, 40);
  else { data.maps.words.forEach(consider); data.words.forEach((_, word) => { if (!everywhere.has(word)) consider(word); }); }
  const words = found.flat().slice(0, 40);
  marked = words.length ? 0 : -1;
  list.replaceChildren(...(words.length ? words.map((word, i) => {
    const item = node("li"), text = node("bdi", visible(data.words[word]));
    item.id = "o" + i;
    item.role = "option";
    item.dataset.word = word;
    item.setAttribute("aria-selected", String(i === marked));
    item.append(text, node("small", everywhere.has(word) ? "on every patch" : "where it is among the best " + k));
    return item;
  }) : [node("li", "no token is near it, and it is in neither question nor answer", "none")]));
  open(true);
}
function open(yes) {
  list.hidden = !yes;
  input.setAttribute("aria-expanded", String(yes));
  if (yes && marked >= 0) input.setAttribute("aria-activedescendant", "o" + marked); else input.removeAttribute("aria-activedescendant");
}
function seek(word) {
  state.word = word;
  state.mode = "search";
  state.original = false;
  el("original").setAttribute("aria-pressed", "false");
  input.value = visible(data.words[word]);
  el("clear").hidden = false;
  open(false);
  paint();
}
function unseek() {
  state.word = -1;
  state.mode = "classes";
  input.value = "";
  el("clear").hidden = true;
  open(false);
  paint();
}
input.addEventListener("input", suggest);
input.addEventListener("focus", () => { input.select(); if (list.hidden) suggest(); });
input.addEventListener("blur", () => setTimeout(() => open(false), 150));
input.addEventListener("keydown", (event) => {
  const items = [...list.querySelectorAll("[data-word]")];
  if (event.key === "Escape") { if (list.hidden) unseek(); else open(false); return; }
  if (event.key === "Enter" && !list.hidden && marked >= 0) { event.preventDefault(); seek(Number(items[marked].dataset.word)); return; }
  if ((event.key === "ArrowDown" || event.key === "ArrowUp") && items.length) {
    event.preventDefault();
    if (list.hidden) { suggest(); return; }
    marked = (marked + (event.key === "ArrowDown" ? 1 : -1) + items.length) % items.length;
    items.forEach((item, i) => item.setAttribute("aria-selected", String(i === marked)));
    items[marked].scrollIntoView({ block: "nearest" });
    open(true);
  }
});
list.addEventListener("pointerdown", (event) => {
  event.preventDefault();
  const item = event.target.closest("[data-word]");
  if (item) seek(Number(item.dataset.word));
});
el("clear").addEventListener("click", unseek);

for (const button of document.querySelectorAll("button[data-mode]")) button.addEventListener("click", () => { unseek(); state.mode = button.dataset.mode; paint(); });
for (const button of document.querySelectorAll("[data-lens]")) button.addEventListener("click", () => { state.lens = Number(button.dataset.lens); paint(); });
for (const button of document.querySelectorAll(".kind")) {
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(on));
    hideKinds();
  });
}
function hideKinds() {
  for (const button of document.querySelectorAll(".kind")) {
    const layer = svg.querySelector('[data-kind="' + button.dataset.class + '"]');
    if (layer) layer.style.display = button.getAttribute("aria-pressed") === "true" ? "" : "none";
  }
}
el("level").max = data.levels.length - 1;
el("level").addEventListener("input", () => level(Number(el("level").value)));
el("opacity").addEventListener("input", () => stage.style.setProperty("--alpha", el("opacity").value / 100));
for (const name of ["lines", "original"]) {
  el(name).addEventListener("click", () => {
    const on = el(name).getAttribute("aria-pressed") !== "true";
    el(name).setAttribute("aria-pressed", String(on));
    if (name === "original") state.original = on;
    paint();
  });
}
document.addEventListener("click", (event) => {
  const from = event.target.closest("#best [data-token], .chips [data-token], [data-pin], .patch [data-word], .through tr[data-level]");
  if (!from) return;
  if (from.dataset.token) point(Number(from.dataset.token), true);
  else if (from.dataset.pin) pin(Number(from.dataset.pin) < 0 ? state.pinned : Number(from.dataset.pin));
  else if (from.dataset.word) seek(Number(from.dataset.word));
  else level(Number(from.dataset.level));
});
el("extra").addEventListener("pointerover", (event) => { const chip = event.target.closest("[data-token]"); if (chip) point(Number(chip.dataset.token)); });
el("extra").addEventListener("focusin", (event) => { const chip = event.target.closest("[data-token]"); if (chip) point(Number(chip.dataset.token), true); });

/* Pictures and tiles: a tab each. */
const tabs = document.querySelector(".tabs");
function show(grid) {
  state.grid = grid;
  const first = data.grids[grid].places.flat().find((token) => token >= 0);
  if (homes[state.at].grid !== grid && first !== undefined) state.at = first;
  build();
  hideKinds();
  paint();
}
if (data.grids.length > 1) {
  tabs.hidden = false;
  data.grids.forEach((grid, i) => {
    const tab = node("button", grid.name);
    tab.type = "button";
    tab.role = "tab";
    tab.dataset.grid = i;
    tab.setAttribute("aria-controls", "stage");
    tab.addEventListener("click", () => show(i));
    tabs.append(tab);
  });
  tabs.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const to = (state.grid + step + data.grids.length) % data.grids.length;
    show(to);
    tabs.children[to].focus();
  });
}

const strip = el("ramp").getContext("2d");
for (let x = 0; x < 120; x++) { strip.fillStyle = "rgb(" + ramp(x / 119).join(",") + ")"; strip.fillRect(x, 0, 1, 1); }
/* Begin at the patch whose best word is rarest in this picture, and surest among those. */
{
  const times = new Map(), words = ids(0, 0), scores = codes(0, 0), tokens = data.grids[0].places.flat().filter((token) => token >= 0);
  for (const token of tokens) times.set(words[token * k], (times.get(words[token * k]) || 0) + 1);
  const rank = (token) => scores[token * k] - 256 * times.get(words[token * k]);
  state.at = tokens.reduce((a, b) => (rank(b) > rank(a) ? b : a), tokens[0] ?? 0);
}
/* Where all are of one class there is more to see in their words. */
if (data.classes.filter((one) => one.count).length === 1) state.mode = "words";
show(0);
