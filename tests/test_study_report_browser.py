"""The study's page in a browser: sorting, drill-down, tooltips, both colour schemes, a phone, and nothing asked of anyone."""

from __future__ import annotations

import pytest

import study_results_cases as cases
from browsing import BROWSER, in_a_browser
from sparing.study.pages import write_study_report
from sparing.study.results import read_results

pytestmark = in_a_browser


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    path = folder / "report.html"
    write_study_report(read_results(cases.realistic(folder / "out")), path)
    return path


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, report, request):
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **getattr(request, "param", {})})
    opened = context.new_page()
    wrong: list[str] = []
    opened.on("console", lambda message: wrong.append(message.text))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on(
        "request", lambda asked: wrong.append(asked.url) if not asked.url.startswith(("file:", "data:")) else None
    )
    opened.goto(report.as_uri())
    yield opened
    assert wrong == []
    assert opened.evaluate("window.hacked") is None
    assert opened.evaluate("document.querySelectorAll('img').length") == 0
    context.close()


def column(page, body, n):
    rows = page.locator(f"table.grid >> nth=0 >> tbody >> nth={body} >> tr:not(.head)")
    values = [row.locator("td,th").nth(n).get_attribute("data-v") for row in rows.all()]
    return [None if v in (None, "nan") else float(v) for v in values]


def test_a_click_on_a_heading_sorts_each_group(page):
    head = page.locator("table.grid >> nth=0 >> button.sort[data-col='1']")
    before = column(page, 0, 1)
    head.click()
    # Less loss is better: the best first.
    assert column(page, 0, 1) == sorted(before) != before
    assert column(page, 1, 1) == sorted(column(page, 1, 1))
    head.click()
    assert column(page, 0, 1) == sorted(before, reverse=True)
    assert page.locator("th[aria-sort=descending]").count() == 1
    more = page.locator("table.grid >> nth=0 >> button.sort[data-col='2']")
    more.press("Enter")
    assert column(page, 0, 2) == sorted(column(page, 0, 2), reverse=True)


def test_a_click_on_a_value_shows_all_that_is_known_of_its_cells(page):
    page.locator("button.open", has_text="1 failed").first.click()
    dialog = page.locator("dialog")
    assert dialog.is_visible()
    said = dialog.inner_text()
    assert "router (budget=0.9" in said
    assert "against the baseline" in said
    assert cases.EVIL in said
    dialog.locator("summary", has_text="traceback").click()
    assert "RuntimeError" in dialog.locator("pre").first.inner_text()
    dialog.locator("summary", has_text="seed 0").click()
    # Built when it is opened.
    dialog.locator("h3", has_text="accuracy of 60 items").wait_for()
    said = dialog.inner_text()
    for part in (
        "95% interval",
        "accuracy of 60 items",
        "method.with.budget",
        "attention: 1, 3",
        "seconds of the task",
    ):
        assert part in said
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    page.locator("#trouble button.cell").first.press("Enter")
    assert dialog.is_visible()
    page.locator("#close").click()
    assert not dialog.is_visible()


def test_a_value_tells_how_it_came_out_against_its_control(page):
    row = page.locator("table.grid >> nth=0 >> tbody >> nth=0 >> tr", has_text="search (budget=0.7)")
    assert "control: random (budget=0.7)" in row.locator("th").inner_text()
    value = row.locator("button.open").first
    assert "random: better −0.191" in " ".join(value.inner_text().split())
    colours = [
        value.locator(f"small.{name}").evaluate("(e) => getComputedStyle(e).color") for name in ("better", "worse")
    ]
    assert colours[0] != colours[1]
    value.click()
    said = page.locator("dialog").inner_text()
    assert "against its control random (budget=0.7): −0.191, 95%:" in said
    assert "its control: random (budget=0.7)" in said
    # Its own cell is open; the control's three seeds wait to be.
    assert page.locator("dialog .one").count() == 4
    assert page.locator("dialog .one[open]").count() == 1
    page.locator("dialog .one summary", has_text="seed 2").first.click()
    # What a cell holds is written once it is open, a moment after the click.
    page.locator("dialog .one").last.get_by_text("method.with.budget").first.wait_for(timeout=10_000)


def test_points_tell_what_they_are_to_pointer_and_keyboard(page):
    tip = page.locator("#tip")
    point = page.locator(".plot:not([hidden]) .pt").first
    point.hover()
    assert "dense" in tip.inner_text()
    assert "prefill speed-up (batch 1): 1.000×" in tip.inner_text()
    assert "baseline" in tip.inner_text()
    page.mouse.move(2, 2)
    assert tip.is_hidden()
    point.focus()
    assert tip.is_visible()
    page.keyboard.press("Tab")
    assert "search (budget=0.9)" in tip.inner_text()
    page.keyboard.press("Enter")
    assert page.locator("dialog").is_visible()
    # Quality and cost: the cells of both tasks.
    assert page.locator("dialog .one").count() == 2


def test_one_cost_at_a_time(page):
    section = page.locator("section.front").first
    assert section.locator(".plot:visible").count() == 1
    section.locator(".axes button", has_text="counted").click()
    assert "operations" in section.locator(".plot:visible svg").get_attribute("aria-label")
    assert section.locator(".axes button[aria-pressed=true]").inner_text().startswith("counted")


@pytest.mark.parametrize("page", [{"color_scheme": "dark"}, {"color_scheme": "light"}], indirect=True)
def test_it_follows_the_readers_colours(page, request):
    dark = request.node.callspec.params["page"]["color_scheme"] == "dark"
    colour = "(e) => getComputedStyle(e)"
    ground = page.evaluate(f"({colour})(document.body).backgroundColor")
    ink = page.evaluate(f"({colour})(document.querySelector('button.open b')).color")
    bright = [sum(map(int, c.removeprefix("rgb(").rstrip(")").split(","))) / 3 for c in (ground, ink)]
    assert (bright[0] < 60 < 160 < bright[1]) == dark
    assert (bright[1] < 60 < 200 < bright[0]) != dark


@pytest.mark.parametrize("page", [{"viewport": {"width": 400, "height": 800}}], indirect=True)
def test_nothing_sticks_out_of_a_phone(page):
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.locator("button.open").first.click()
    box = page.locator("dialog").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 400


def test_print_shows_the_tables_and_no_buttons(page):
    page.emulate_media(media="print")
    assert page.locator(".axes").first.is_hidden()
    assert page.locator("table.grid").first.is_visible()
    assert page.locator("section.front .plot:visible").count() == page.locator("section.front").count()


def test_the_warning_of_a_shrunk_run_stays_in_sight(browser, tmp_path):
    rows = [
        (cases.cell("m", cases.variant(f"a{i}"), cases.variant("stories"), shrink=True), cases.loss([1.0, 2.0]))
        for i in range(40)
    ]
    write_study_report(read_results(cases.stored(tmp_path, rows, shrink=True)), tmp_path / "report.html")
    opened = browser.new_page()
    opened.goto((tmp_path / "report.html").as_uri())
    opened.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    alarm = opened.locator(".alarm")
    assert "These figures mean nothing" in alarm.inner_text()
    box = alarm.bounding_box()
    assert 0 <= box["y"] < 5
    opened.locator("button.open").last.click()
    assert "mean nothing" in opened.locator("dialog").inner_text()
    opened.close()
