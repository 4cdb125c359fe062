const range = document.getElementById("layer"), at = document.getElementById("at"), play = document.getElementById("play");
const modules = document.querySelectorAll("#pictures .switch button"), cells = document.querySelectorAll(".ledger button");
const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
const view = { module: "attention", layer: 0, hover: null };

/* The colours of the page, for the canvases. */
let paint = {};
function mix() {
  const probe = node("i");
  document.body.append(probe);
  const colour = (value) => { probe.style.color = value; return getComputedStyle(probe).color; };
  paint = {
    frames: [null, null, colour("var(--f2)"), colour("var(--f3)")],
    states: [0, 1, 2, 3].map((state) => colour("var(--k" + state + ")")), words: [0, 1, 2, 3].map((state) => colour("var(--w" + state + ")")), net: colour("var(--net)"), ink: colour("var(--ink)"),
    shares: Array.from({ length: 21 }, (_, i) => colour("color-mix(in srgb, color-mix(in oklab, var(--ran) " + 5 * i + "%, var(--cell)) 72%, transparent)")),
  };
  probe.remove();
}

function share(pattern) {
  return [...pattern.attention, ...pattern.mlp].filter((state) => state === "3").length / (2 * data.layers);
}
const shares = data.patterns.map(share);
const state = (pattern) => Number(data.patterns[pattern][view.module][view.layer]);
const colour = (pattern, scale) => (view.module === "all" ? paint.shares[Math.round(20 * shares[pattern])] : scale[state(pattern)]);

function spanOf(element) {
  return data.questions[Number(element.closest("article").dataset.q)].spans[Number(element.dataset.span)];
}

function draw(canvas) {
  const span = spanOf(canvas), [rows, columns] = span.grid, scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const pen = canvas.getContext("2d"), x = canvas.width / columns, y = canvas.height / rows;
  const framed = view.module !== "all" && Math.min(x, y) > 9 * scale, line = Math.max(1.5 * scale, Math.min(x, y) / 11);
  span.patches.forEach((pattern, i) => {
    const left = Math.round((i % columns) * x), top = Math.round(Math.floor(i / columns) * y);
    pen.fillStyle = colour(pattern, paint.states);
    const wide = Math.round((i % columns + 1) * x) - left, high = Math.round((Math.floor(i / columns) + 1) * y) - top;
    /* Frames leave the colours of the picture as they are; fields too small for them are tinted. */
    const frame = framed && paint.frames[state(pattern)];
    if (!frame) return pen.fillRect(left, top, wide, high);
    pen.strokeStyle = frame;
    pen.lineWidth = line;
    pen.strokeRect(left + line / 2 + scale / 2, top + line / 2 + scale / 2, wide - line - scale, high - line - scale);
  });
  if (Math.min(x, y) > 4 * scale) {
    pen.fillStyle = paint.net;
    for (let i = 1; i < columns; i++) pen.fillRect(Math.round(i * x), 0, 1, canvas.height);
    for (let i = 1; i < rows; i++) pen.fillRect(0, Math.round(i * y), canvas.width, 1);
  }
  if (view.hover && view.hover.canvas === canvas) {
    pen.strokeStyle = paint.ink;
    pen.lineWidth = 2 * scale;
    pen.strokeRect((view.hover.patch % columns) * x + scale, Math.floor(view.hover.patch / columns) * y + scale, x - 2 * scale, y - 2 * scale);
  }
}

function drawAll() {
  for (const canvas of document.querySelectorAll(".field canvas")) draw(canvas);
  for (const extra of document.querySelectorAll(".extra")) extra.firstElementChild.style.background = colour(spanOf(extra).extra[0], paint.words);
  for (const word of document.querySelectorAll(".tokens .t")) {
    const token = data.questions[Number(word.closest("article").dataset.q)].tokens[Number(word.dataset.i)];
    word.style.background = colour(token.pattern, paint.words);
  }
  const all = view.module === "all";
  for (const cell of cells) {
    cell.classList.toggle("now", !all && cell.dataset.module === view.module && Number(cell.dataset.layer) === view.layer);
  }
  range.value = view.layer;
  range.disabled = play.disabled = all;
  at.textContent = all ? "all layers" : "layer " + view.layer;
  document.querySelector("#pictures .states").hidden = all;
  document.querySelector("#pictures .shares").hidden = !all;
}

function set(module, layer) {
  view.module = module;
  view.layer = layer;
  press([...modules].find((button) => button.dataset.module === module), modules);
  drawAll();
}

let clock = 0;
function stop() {
  window.clearInterval(clock);
  clock = 0;
  play.textContent = "▶";
}
play.addEventListener("click", () => {
  if (clock) return stop();
  play.textContent = "❚❚";
  if (view.layer === data.layers - 1) set(view.module, 0);
  clock = window.setInterval(() => {
    if (view.layer === data.layers - 1) return stop();
    set(view.module, view.layer + 1);
  }, still ? 1500 : 700);
});
range.addEventListener("input", () => { stop(); set(view.module, Number(range.value)); });
for (const button of modules) button.addEventListener("click", () => { stop(); set(button.dataset.module, view.layer); });
for (const cell of cells) cell.addEventListener("click", () => { stop(); set(cell.dataset.module, Number(cell.dataset.layer)); });

function hide() {
  const last = view.hover;
  view.hover = null;
  tip.hidden = true;
  if (last && last.canvas) draw(last.canvas);
}

function tell(title, more, patterns, rect) {
  tip.replaceChildren(node("b", title), document.createTextNode("  " + more));
  const known = new Map();
  for (const pattern of patterns) known.set(pattern, (known.get(pattern) || 0) + 1);
  for (const [pattern, count] of [...known].slice(0, 3)) {
    if (known.size > 1) tip.append(node("div", count + " of them:"));
    tip.append(...layers(data.patterns[pattern]));
  }
  tip.hidden = false;
  place(rect);
}

function overPatch(canvas, event) {
  const span = spanOf(canvas), box = canvas.getBoundingClientRect(), [rows, columns] = span.grid;
  const row = Math.min(rows - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * rows)));
  const column = Math.min(columns - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * columns)));
  const patch = row * columns + column;
  if (view.hover && view.hover.canvas === canvas && view.hover.patch === patch) return;
  hide();
  view.hover = { canvas, patch };
  draw(canvas);
  const left = box.left + column * box.width / columns, top = box.top + row * box.height / rows;
  tell("row " + row + ", column " + column, "of the grid", [span.patches[patch]], { left, top, bottom: top + box.height / rows });
}

const section = document.getElementById("pictures");
section.addEventListener("pointermove", (event) => {
  const canvas = event.target.closest("canvas"), word = event.target.closest(".tokens .t"), extra = event.target.closest(".extra");
  if (canvas) return overPatch(canvas, event);
  hide();
  if (extra) tell(spanOf(extra).extra.length + " tokens", "newlines, an overview, a class token: on no field", spanOf(extra).extra, extra.getBoundingClientRect());
  if (!word) return;
  const token = data.questions[Number(word.closest("article").dataset.q)].tokens[Number(word.dataset.i)];
  tell(JSON.stringify(token.text), token.role === "system" ? "before the picture" : token.role, [token.pattern], word.getClientRects()[0]);
  if (token.dense !== undefined) tip.append(surprise(token));
});
section.addEventListener("pointerleave", hide);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { mix(); drawAll(); });
new ResizeObserver(drawAll).observe(section);
mix();
drawAll();
