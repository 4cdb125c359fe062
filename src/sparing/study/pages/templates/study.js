"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip"), dialog = document.getElementById("cell"), body = document.getElementById("cell-body");

/* Text goes in as text only: names, errors and answers come from anywhere. */
function node(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined && text !== null) made.textContent = text;
  if (name) made.className = name;
  return made;
}

/* Tables: sort the rows of every group by a column; what has no number stays last. */
for (const button of document.querySelectorAll("button.sort")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), column = Number(button.dataset.col), table = button.closest("table");
    const better = button.dataset.better, first = better === "higher" ? "descending" : "ascending";
    const now = head.getAttribute("aria-sort");
    const order = now === "none" ? first : now === "ascending" ? "descending" : "ascending";
    for (const other of table.querySelectorAll("th[aria-sort]")) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    for (const group of table.tBodies) {
      const rows = [...group.rows].filter((row) => !row.classList.contains("head"));
      const key = (row) => {
        if (column === 0) return row.cells[0].textContent;
        const value = row.cells[column].dataset.v;
        return value === undefined || value === "nan" ? null : value === "inf" ? Infinity : value === "-inf" ? -Infinity : Number(value);
      };
      rows.map((row) => [key(row), row]).sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        return sign * (typeof a === "string" ? a.localeCompare(b, undefined, { numeric: true }) : a === b ? 0 : a < b ? -1 : 1);
      }).forEach(([, row]) => group.append(row));
    }
  });
}

/* Charts: one cost at a time. */
for (const button of document.querySelectorAll(".axes button")) {
  button.addEventListener("click", () => {
    const section = button.closest("section");
    section.querySelectorAll(".axes button").forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
    section.querySelectorAll(".plot").forEach((plot, i) => { plot.hidden = i !== Number(button.dataset.plot); });
    hide();
  });
}

let shown = null;
function hide() {
  if (shown) shown.classList.remove("shown");
  shown = null;
  tip.hidden = true;
}
function show(point) {
  hide();
  shown = point;
  point.classList.add("shown");
  const [label, ...lines] = point.dataset.t.split("\n");
  tip.replaceChildren(node("b", label), ...lines.filter(Boolean).map((line) => node("div", line)));
  tip.hidden = false;
  const at = point.getBoundingClientRect();
  const left = Math.max(8, Math.min(at.left + 16, document.documentElement.clientWidth - tip.offsetWidth - 8));
  const below = at.bottom + tip.offsetHeight + 12 < window.innerHeight;
  tip.style.left = left + window.scrollX + "px";
  tip.style.top = (below ? at.bottom + 6 : at.top - tip.offsetHeight - 6) + window.scrollY + "px";
}
for (const point of document.querySelectorAll(".pt")) {
  point.addEventListener("pointerenter", () => show(point));
  point.addEventListener("pointerleave", hide);
  point.addEventListener("focus", () => show(point));
  point.addEventListener("blur", hide);
  point.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(point); }
    if (event.key === "Escape") hide();
  });
}

/* The cell behind a value. */
document.addEventListener("click", (event) => {
  const from = event.target.closest("[data-e]");
  if (from) open(from);
  else if (event.target === dialog) dialog.close();
});
document.getElementById("close").addEventListener("click", () => dialog.close());

function open(from) {
  const entry = data.entries[Number(from.dataset.e)];
  hide();
  document.getElementById("cell-title").textContent = entry.title;
  const warning = document.querySelector(".alarm");
  body.replaceChildren(...(warning ? [node("p", warning.textContent, "bad")] : []), ...entry.said.filter(Boolean).map((line) => node("p", line)));
  entry.cells.forEach((i) => body.append(cell(data.cells[i], entry.figure, entry.cells.length === 1)));
  for (const group of entry.more) {
    body.append(node("h3", group.title, "other"));
    group.cells.forEach((i) => body.append(cell(data.cells[i], entry.figure, false)));
  }
  dialog.showModal();
  dialog.scrollTop = 0;
}

function digits(value) {
  if (typeof value !== "number") return value === null || value === undefined ? "" : String(value);
  const size = Math.abs(value);
  return (size !== 0 && (size < 1e-4 || size >= 1e9) ? value.toExponential(3) : Number(value.toPrecision(5)).toLocaleString("en", { maximumFractionDigits: 9 })).replace("-", "−");
}

function cell(c, figure, alone) {
  const one = node("details", null, "one");
  one.open = alone || c.status === "failed";
  const value = c.figures[figure] ? ": " + figure + " " + digits(c.figures[figure][0]) : "";
  one.append(node("summary", c.task + (c.seed === null ? "" : ", seed " + c.seed) + " – " + c.status + value));
  // Built when it is first opened: a cell may hold much.
  const fill = () => { if (one.open && one.childElementCount === 1) one.append(...inside(c, figure)); };
  one.addEventListener("toggle", fill);
  fill();
  return one;
}

function inside(c, figure) {
  const parts = [];
  if (c.error) parts.push(node("h3", c.status === "failed" ? "error" : "why not"), node("p", c.error));
  if (c.traceback !== null) {
    const where = node("details");
    where.append(node("summary", "traceback"), node("pre", data.texts[c.traceback]));
    parts.push(where);
  }
  const names = Object.keys(c.figures);
  if (names.length) {
    const table = node("table"), head = node("tr");
    for (const title of ["figure", "value", "95% interval", "items", "unit"]) head.append(node("th", title));
    table.append(head);
    for (const name of names) {
      const [at, low, high, n, better, unit] = c.figures[name], row = node("tr", null, name === figure ? "main" : "");
      row.append(node("td", name + (better === "higher" ? " ↑" : better === "lower" ? " ↓" : "")), node("td", digits(at)),
        node("td", low === null ? "" : digits(low) + " – " + digits(high)), node("td", digits(n)), node("td", unit));
      table.append(row);
    }
    const scroll = node("div", null, "scroll");
    scroll.append(table);
    parts.push(node("h3", "figures"), scroll);
  }
  for (const [name, found] of Object.entries(c.items)) parts.push(node("h3", name + " of " + found.n + " items"), scores(found));
  if (Object.keys(c.details.method || {}).length) parts.push(node("h3", "what the method chose"), tree(c.details.method));
  parts.push(node("h3", "settings"), tree(Object.fromEntries(Object.entries(c.settings).map(([name, i]) => [name, data.settings[i]]))));
  const rest = Object.fromEntries(Object.entries(c.details).filter(([name]) => name !== "method"));
  if (Object.keys(rest).length) {
    const more = node("details");
    more.append(node("summary", "details"), node("pre", JSON.stringify(rest, null, 1)));
    parts.push(more);
  }
  parts.push(node("h3", "run"), tree({ started: c.started, "seconds of the task": c.seconds, "seconds of preparing": c.prepared, cell: c.key, subject: c.subject }));
  const where = node("details");
  where.append(node("summary", "environment"), tree(data.environments[c.environment]));
  parts.push(where);
  return parts;
}

function scores(found) {
  const line = node("p");
  if (!found.bins) { line.textContent = "no finite score"; return line; }
  const most = Math.max(...found.bins), chart = node("span", null, "histogram");
  found.bins.forEach((n) => { const bar = node("i"); bar.style.height = (n ? Math.max(8, 100 * n / most) : 0) + "%"; bar.title = String(n); chart.append(bar); });
  line.append(chart, node("span", "  " + digits(found.min) + " to " + digits(found.max) + ", quartiles " + found.quartiles.map(digits).join(" / ") + ", mean " + digits(found.mean) + (found.no_number ? "; " + found.no_number + " are no number" : "")));
  return line;
}

/* Nested settings as lines "a.b  value". */
function tree(value) {
  const list = node("dl");
  (function walk(inner, path) {
    if (inner !== null && typeof inner === "object" && !Array.isArray(inner)) {
      const names = Object.keys(inner);
      if (!names.length && path) list.append(node("dt", path), node("dd", "–"));
      names.forEach((name) => walk(inner[name], path ? path + "." + name : name));
    } else list.append(node("dt", path), node("dd", typeof inner === "number" ? digits(inner) : typeof inner === "string" ? inner : JSON.stringify(inner)));
  })(value, "");
  return list;
}
