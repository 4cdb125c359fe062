"""The profile's report in a browser: it renders, its script runs, and it asks nothing of anyone."""

import json
import re

import pytest
from PIL import Image

import picture_cases
import processors
import profile_cases as cases
from browsing import browse, in_a_browser
from sparing.evaluate import PictureMaterial, Profiler, profile, read_questions
from sparing.study import write_report

pytestmark = in_a_browser

# Appended to the page: what a reader would do, and what came of it, as attributes that --dump-dom shows.
PROBE = """
<script>
{
const errors = [];
window.addEventListener("error", (event) => errors.push(event.message));
const spans = document.querySelectorAll(".t");
document.querySelector(".switch button[data-mode=share]").click();
const share = getComputedStyle(spans[3]).backgroundColor;
document.querySelector(".switch button[data-mode=loss]").click();
spans[3].dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
const tip = document.getElementById("tip");
const rect = document.querySelector("svg rect");
document.body.dataset.probe = JSON.stringify({
  errors, spans: spans.length, share, mode: document.getElementById("page").dataset.mode,
  tip: tip.hidden ? null : tip.textContent, fill: getComputedStyle(rect).fill,
  width: document.documentElement.scrollWidth, client: document.documentElement.clientWidth,
  requests: performance.getEntriesByType("resource").map((entry) => entry.name).filter((n) => !n.startsWith("data:")),
});
}
</script>
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    found = profile(cases.model(), cases.tokenizer(), cases.text(), settings=cases.SETTINGS)
    write_report(found.as_dict(), {"command": "sparing profile"}, path)
    return path, found


def test_the_page_works_and_asks_for_nothing(report):
    path, found = report
    probed = path.with_name("probed.html")
    probed.write_text(path.read_text().replace("</body>", PROBE + "</body>"))
    run = browse(probed, "--dump-dom", "--window-size=1280,900")
    assert "Uncaught" not in run.stderr
    assert "Content Security Policy" not in run.stderr
    match = re.search(r'data-probe="([^"]*)"', run.stdout)
    assert match, "the script of the page did not run to its end"
    probe = match[1].replace("&quot;", '"')
    seen = json.loads(probe)
    assert seen["errors"] == []
    assert seen["requests"] == []
    assert seen["spans"] == len(found.painting.text)
    assert seen["mode"] == "loss"
    assert re.search(r"attention: .*(ran|skipped|gone)", seen["tip"])
    assert "nats" in seen["tip"]
    assert seen["share"] not in ("rgba(0, 0, 0, 0)", "transparent")
    assert seen["fill"].startswith(("color(", "oklab(", "rgb("))


@pytest.mark.parametrize("width", [1280, 500])
def test_nothing_sticks_out_sideways(report, width):
    path, _ = report
    probed = path.with_name(f"narrow{width}.html")
    probed.write_text(path.read_text().replace("</body>", PROBE + "</body>"))
    probe = re.search(r'data-probe="([^"]*)"', browse(probed, "--dump-dom", f"--window-size={width},900").stdout)
    assert probe
    width_of = {k: int(v) for k, v in re.findall(r"(width|client)&quot;:(\d+)", probe[1])}
    assert width_of["width"] <= width_of["client"]


@pytest.mark.parametrize(("scheme", "dark"), [("0", True), ("1", False)])
def test_it_follows_the_readers_colours(report, scheme, dark, tmp_path):
    path, _ = report
    picture = tmp_path / "page.png"
    browse(path, f"--screenshot={picture}", "--window-size=900,1200", f"--blink-settings=preferredColorScheme={scheme}")
    with Image.open(picture) as image:
        grey = image.convert("L")
        corner = grey.getpixel((4, 4))
        assert len(grey.getcolors()) > 60
    assert (corner < 60) == dark
    assert (corner > 200) != dark


PICTURE_PROBE = """
<script>
{
const canvases = [...document.querySelectorAll(".field canvas")];
const colours = (canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height), found = new Set();
  for (let i = 0; i < data.length; i += 4) found.add(data.slice(i, i + 4).join());
  return [...found].sort().join(" ");
};
const seen = {};
for (const module of ["attention", "mlp"]) {
  document.querySelector(`.switch button[data-module=${module}]`).click();
  seen[module] = [];
  for (let layer = 0; layer < data.layers; layer++) {
    range.value = layer;
    range.dispatchEvent(new Event("input"));
    seen[module].push(colours(canvases[0]));
  }
}
document.querySelector(".switch button[data-module=all]").click();
const disabled = range.disabled;
document.querySelector(".ledger button[data-module=mlp][data-layer='1']").click();
const box = canvases[0].getBoundingClientRect();
const point = { bubbles: true, clientX: box.left + box.width * .9, clientY: box.top + box.height * .4 };
canvases[0].dispatchEvent(new PointerEvent("pointermove", point));
const patch = tip.textContent;
document.querySelector(".tokens .answer").dispatchEvent(new PointerEvent("pointermove", { bubbles: true }));
document.body.dataset.probe = JSON.stringify({
  seen, patch, disabled, word: tip.textContent, at: at.textContent, canvases: canvases.length,
  articles: document.querySelectorAll("article").length,
  images: [...document.images].every((image) => image.complete && image.naturalWidth > 0),
  pressed: document.querySelector(".switch button[aria-pressed=true]").dataset.module,
  width: document.documentElement.scrollWidth, client: document.documentElement.clientWidth,
  requests: performance.getEntriesByType("resource").map((entry) => entry.name).filter((n) => !n.startsWith("data:")),
});
}
</script>
"""


@pytest.fixture(scope="module", params=["llava", "onevision"])
def picture_report(request, tmp_path_factory):
    """One grid a picture; a grid that is not square, with an overview and newlines on no field."""
    folder = tmp_path_factory.mktemp(request.param)
    model, processor = processors.family(request.param)
    material = PictureMaterial(model, processor, read_questions(picture_cases.folder(folder / "p")))
    found = Profiler(material, picture_cases.SETTINGS).run()
    write_report(found.as_dict(), {"command": "sparing profile"}, folder / "report.html", pictures=material.shown())
    return folder / "report.html", found


@pytest.mark.parametrize("width", [1280, 500])
def test_pictures_can_be_stepped_through(picture_report, width):
    path, found = picture_report
    probed = path.with_name("probed.html")
    probed.write_text(path.read_text().replace("</body>", PICTURE_PROBE + "</body>"))
    run = browse(probed, "--dump-dom", f"--window-size={width},900")
    assert "Uncaught" not in run.stderr
    assert "Content Security Policy" not in run.stderr
    match = re.search(r'data-probe="([^"]*)"', run.stdout)
    assert match, "the script of the page did not run to its end"
    seen = json.loads(match[1].replace("&quot;", '"'))
    page = found.painting
    assert seen["articles"] == len(page.questions)
    assert seen["canvases"] == sum(len(question["spans"]) for question in page.questions)
    assert seen["images"]
    assert seen["disabled"]
    assert (seen["at"], seen["pressed"]) == ("layer 1", "mlp")
    assert seen["requests"] == []
    assert seen["width"] <= seen["client"]
    rows, columns = page.questions[0]["spans"][0]["grid"]
    assert seen["patch"].startswith(f"row {int(0.4 * rows)}, column {int(0.9 * columns)}")
    assert re.search(r"attention: .*(ran|read|skipped|gone)", seen["patch"])
    assert "nats" in seen["word"]
    # Layers in which the patches have the same states look the same, others do not.
    patches = page.questions[0]["spans"][0]["patches"]
    for module, looks in seen["seen"].items():
        states = ["".join(page.patterns[p][module][layer] for p in patches) for layer in range(len(looks))]
        for i in range(len(looks)):
            for j in range(i):
                assert (looks[i] == looks[j]) == (set(states[i]) == set(states[j]))
