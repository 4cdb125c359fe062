"""The profile's report in a browser: it renders, its script runs, and it asks nothing of anyone."""

import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

import profile_cases as cases
from sparing.evaluate import profile
from sparing.study import write_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no chromium here: apt-get install chromium"),
]

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


def browse(page, *flags):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


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
