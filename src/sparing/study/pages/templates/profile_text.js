const page = document.getElementById("page");

const modes = document.querySelectorAll(".switch button");
for (const button of modes) {
  button.addEventListener("click", () => {
    page.dataset.mode = button.dataset.mode;
    press(button, modes);
  });
}

function fill(token) {
  tip.replaceChildren(node("b", JSON.stringify(token.text.replaceAll("⏎", ""))), document.createTextNode("  " + token.kind));
  tip.append(...layers(data.patterns[token.pattern]));
  tip.append(token.dense === null ? node("div", "first of its window: not predicted") : surprise(token));
}

let shown = null;
function show(span) {
  if (shown) shown.classList.remove("on");
  shown = span;
  tip.hidden = !span;
  if (!span) return;
  span.classList.add("on");
  fill(data.tokens[Number(span.dataset.i)]);
  place(span.getClientRects()[0]);
}
page.addEventListener("pointerover", (event) => show(event.target.closest(".t")));
page.addEventListener("pointerleave", () => show(null));
page.addEventListener("scroll", () => show(null));
