"""What a study's results say: contrasts, tables and fronts against numbers worked out by hand, and the page made of them."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from scipy import stats

import study_results_cases as cases
from sparing.evaluate.task import Figure
from sparing.study.contrast import contrast, value_of
from sparing.study.fronts import fronts_of, undominated
from sparing.study.pages import numbers, render_study, write_study_report
from sparing.study.pages.drill_down import bounded, summary
from sparing.study.pages.scatter import Scale, scale
from sparing.study.results import read_results
from sparing.study.store import Result, Store
from sparing.study.tables import tables_of
from study_results_cases import EVIL, cell, done, loss, stored, variant

DENSE, SEARCH, RANDOM = variant("dense"), variant("search", "skip_search"), variant("random", "skip_random")
STORIES, SPEED = variant("stories"), variant("speed")


def read(folder, *rows, **about):
    return read_results(stored(folder, rows, **about))


# Contrasts --------------------------------------------------------------------------------------------------------------


def test_one_pair_is_compared_item_by_item(tmp_path):
    base, other = [1.0, 2.0, 3.0, 4.0], [1.5, 2.5, 2.0, 5.0]
    found = read(tmp_path, (cell("m", DENSE, STORIES), loss(base)), (cell("m", SEARCH, STORIES), loss(other)))
    difference = contrast(found.cells[:1], found.cells[1:], "loss")
    # +0.5, +0.5, -1, +1: mean 0.25, standard deviation sqrt(2.25 / 3), t of 3 degrees.
    half = stats.t.ppf(0.975, 3) * math.sqrt((3 * 0.25**2 + 0 + (1.25**2) + 0.75**2 - 0.25**2) / 3) / 2
    assert difference.value == pytest.approx(0.25)
    assert (difference.low, difference.high) == (pytest.approx(0.25 - half), pytest.approx(0.25 + half))
    assert (difference.higher, difference.lower) == (3, 1)
    # The sign test: 3 against 1 of 4 fair coins, both sides.
    assert difference.p == pytest.approx(2 * (4 + 1) / 16)
    assert difference.verdict == "unsure"
    assert difference.basis == "4 items"


def test_with_seeds_both_seeds_and_items_count(tmp_path):
    base = [1.0, 2.0, 3.0]
    added = np.array([[0.9, 1.0, 1.1], [1.3, 1.2, 1.1]])
    rows = [(cell("m", DENSE, STORIES), loss(base))]
    rows += [(cell("m", RANDOM, STORIES, seed=s), loss(list(base + added[s]))) for s in range(2)]
    found = read(tmp_path, *rows)
    difference = contrast(found.cells[:1], found.cells[1:], "loss")
    # Seeds' means 1.0 and 1.2; items' means all 1.1: variances 0.02 / 2 and 0 / 3.
    assert difference.value == pytest.approx(1.1)
    half = stats.t.ppf(0.975, 1) * math.sqrt(0.01)
    assert difference.high == pytest.approx(1.1 + half)
    assert difference.basis == "3 items × 2 seeds"
    value = value_of(found.cells[1:], "loss")
    assert (value.value, value.over) == (pytest.approx(3.1), "seeds")
    assert value.high == pytest.approx(3.1 + half)


def test_one_seed_says_that_it_is_one(tmp_path):
    rows = [(cell("m", DENSE, STORIES), loss([1.0, 2.0])), (cell("m", RANDOM, STORIES, seed=0), loss([1.5, 2.5]))]
    found = read(tmp_path, *rows)
    assert contrast(found.cells[:1], found.cells[1:], "loss").basis == "2 items, one seed only"


def test_intervals_from_seeds_and_items_hold_what_they_promise():
    """Two-way layouts with a known mean: 95% intervals hold it in 92% of the cases or more."""
    dice = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        table = 0.3 * dice.normal(size=(4, 1)) + 0.5 * dice.normal(size=(1, 12)) + 0.4 * dice.normal(size=(4, 12))
        base = [0.0] * 12
        first = _plain(cell("m", DENSE, STORIES), base)
        others = [_plain(cell("m", RANDOM, STORIES, seed=s), list(row)) for s, row in enumerate(table)]
        difference = contrast([first], others, "loss")
        held += difference.low <= 0 <= difference.high
    assert 0.92 * 300 <= held < 300


def _plain(made, values):
    from sparing.study.store import Stored

    return Stored(made.key, made.subject, "m", "x", {}, "none", "stories", made.seed, {}, loss(values))


def test_without_items_intervals_must_not_overlap(tmp_path):
    def speed(value, low, high):
        return done({"speed-up": Figure(value, low, high, 9, "higher")})

    rows = [(cell("m", DENSE, SPEED), speed(1.0, 0.9, 1.1))]
    rows += [(cell("m", variant(f"a{i}"), SPEED), speed(*x)) for i, x in enumerate([(1.2, 1.05, 1.3), (1.3, 1.2, 1.4)])]
    found = read(tmp_path, *rows)
    near, far = (contrast(found.cells[:1], [c], "speed-up") for c in found.cells[1:])
    assert near.verdict == "unsure"
    assert (near.low, near.high) == (pytest.approx(-0.05), pytest.approx(0.4))
    assert far.verdict == "better"
    assert far.p is None


def test_a_side_that_is_no_number_is_never_averaged_away(tmp_path):
    bad = loss([1.0, 2.0])
    bad = dataclasses.replace(
        bad, outcome=dataclasses.replace(bad.outcome, figures={"loss": Figure(math.nan, better="lower")})
    )
    rows = [(cell("m", DENSE, STORIES), loss([1.0, 2.0])), (cell("m", RANDOM, STORIES, seed=0), bad)]
    rows += [(cell("m", RANDOM, STORIES, seed=1), loss([1.5, 2.5]))]
    found = read(tmp_path, *rows)
    difference = contrast(found.cells[:1], found.cells[1:], "loss")
    assert math.isnan(difference.value)
    assert difference.verdict == "unsure"
    value = value_of(found.cells[1:], "loss")
    assert (value.value, value.not_numbers) == (2.0, 1)
    assert value.low is None
    page = render_study(found)
    assert "1 not a number" in page


# Tables -----------------------------------------------------------------------------------------------------------------


def test_the_invented_study_as_tables(tmp_path):
    results = read_results(cases.realistic(tmp_path / "out"))
    costs, speeds = tables_of(results)
    # 2 models x 2 tasks with their main figures; dense, 3 searches, 3 routers, and the 3 controls last.
    assert [(c.model, c.task, c.figure) for c in costs.columns][:2] == [
        ("tiny-llama", "stories", "loss"),
        ("tiny-llama", "quiz", "accuracy"),
    ]
    assert len(costs.columns) == 4
    assert [arm.method for arm, _ in costs.rows] == ["dense"] + ["search"] * 3 + ["router"] * 3 + ["random"] * 3
    assert [arm.control for arm, _ in costs.rows] == [False] * 7 + [True] * 3
    assert [arm.baseline for arm, _ in costs.rows] == [True] + [False] * 9
    router = next(entries for arm, entries in costs.rows if arm.method == "router")
    assert router[1].states == {"done": 2, "failed": 1}
    assert "broke" in router[1].errors[0]
    assert len(router[1].value.seeds) == 2
    # The question on speed asks for one figure that there is and one that there is not, and names no baseline.
    assert [c.figure for c in speeds.columns] == ["prefill speed-up (batch 1)"] * 2
    assert speeds.missing == ("no such",)
    assert [arm.method for arm, _ in speeds.rows] == ["dense"] + ["search"] * 3 + ["random"] * 3
    for table in (costs, speeds):
        for i, column in enumerate(table.columns):
            known = [e[i].value.value for arm, e in table.rows if not arm.baseline and e[i].value]
            known = [v for v in known if math.isfinite(v)]
            best = max(known) if column.better == "higher" else min(known)
            assert {e[i].value.value for _, e in table.rows if e[i].best} == {best}


def test_arms_with_the_same_words_but_other_settings_stay_apart(tmp_path):
    """The training and the method may vary a setting of the same name."""
    trainings = [variant("heal", lr=1), variant("heal", lr=2)]
    methods = [variant("prune", lr=1), variant("prune", lr=2)]
    rows = [(cell("m", m, STORIES, training=t), loss([1.0, 2.0])) for m in methods for t in trainings]
    results = read(tmp_path, *rows, baseline="prune")
    (table,) = tables_of(results)
    assert [arm.label for arm, _ in table.rows] == [f"{m.label} · {t.label}" for m in methods for t in trainings]
    assert [arm.baseline for arm, _ in table.rows] == [True, False, False, False]


def test_a_model_on_which_everything_failed_keeps_its_column(tmp_path):
    rows = [(cell("m", DENSE, STORIES), loss([1.0])), (cell("n", DENSE, STORIES), Result("failed", error="no room"))]
    results = read(tmp_path, *rows)
    (table,) = tables_of(results)
    assert [(c.model, c.figure) for c in table.columns] == [("m", "loss"), ("n", "")]
    assert "no room" in render_study(results)


def test_results_of_an_earlier_version_of_the_study_are_left_out_and_told(tmp_path):
    old, new = cell("m", DENSE, STORIES, salt="old"), cell("m", DENSE, STORIES)
    stored(tmp_path, [(old, loss([9.0, 9.0]))])
    results = read(tmp_path, (new, loss([1.0, 2.0])))
    assert (len(results.cells), results.earlier) == (1, 1)
    assert "1 results of an earlier version" in render_study(results)


# Fronts -----------------------------------------------------------------------------------------------------------------


def test_what_nothing_beats():
    places = [(1, 5), (2, 4), (2, 3), (3, 1), (0, 5), (3, 1)]
    assert undominated(places) == [True, True, False, True, False, True]


def test_points_take_cost_and_quality_of_the_same_subject_only(tmp_path):
    def timed(gain):
        return done({"prefill speed-up (batch 1)": Figure(gain, gain - 0.1, gain + 0.1, 9, "higher")})

    rows = [(cell("m", DENSE, STORIES), loss([1.0, 1.0])), (cell("m", DENSE, SPEED), timed(1.0))]
    for seed, level in enumerate([2.0, 4.0, 9.0]):
        rows.append((cell("m", RANDOM, STORIES, seed=seed), loss([level, level])))
    rows += [(cell("m", RANDOM, SPEED, seed=seed), timed(1.5 + seed)) for seed in (0, 1)]
    rows.append((cell("m", SEARCH, STORIES), loss([1.5, 1.5])))
    (front,) = fronts_of(read(tmp_path, *rows))
    (chart,) = front.charts
    points = {point.arm.method: point for point in chart.points}
    # The third seed was never timed, so that its loss of 9 is not in the point.
    assert points["random"].quality.value == pytest.approx(3.0)
    assert points["random"].cost.value == pytest.approx(2.0)
    assert points["random"].front
    assert chart.left_out == {"search": "no prefill speed-up (batch 1) of the same subject"}


def test_counted_operations_come_from_the_task_or_else_from_the_method(tmp_path):
    results = read_results(cases.realistic(tmp_path / "out"))
    by_task = {(f.model, f.task): f for f in fronts_of(results)}
    quiz = by_task["tiny-llama", "quiz"]
    counted = next(chart for chart in quiz.charts if chart.axis.kind == "counted")
    assert {round(point.cost.value, 12) for point in counted.points} == {0.5, 0.7, 0.9, 1.0}
    names = [chart.axis.name for chart in quiz.charts]
    assert names == ["prefill speed-up (batch 1)", "decode speed-up (batch 1)", "flops_share"]
    left_out = by_task["wide <b>qwen</b>", "stories"].charts[0].left_out
    assert len(left_out) == 3
    assert all("router" in label for label in left_out)


@pytest.mark.parametrize(
    ("low", "high", "log", "ticks"),
    [(0.0, 1.0, False, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (1.0, 1000.0, True, [1, 10, 100, 1000])],
)
def test_scales(low, high, log, ticks):
    made = Scale(low, high, 100, 0, log)
    assert (made(low), made(high)) == (100, 0)
    assert made(1e9) == 0
    assert made(10 if log else 0.5) == pytest.approx(66.7 if log else 50, abs=0.1)
    assert made.ticks() == pytest.approx(ticks)


def test_a_scale_is_not_stretched_by_an_interval_that_knows_nothing(tmp_path):
    found = read(tmp_path, *[(cell("m", variant(f"a{i}"), STORIES), loss([v, v])) for i, v in enumerate([1.0, 2.0])])
    values = [value_of([c], "loss") for c in found.cells]
    wild = dataclasses.replace(values[1], low=-500.0, high=500.0)
    made = scale([values[0], wild], 0, 100)
    assert 0 < made.low < 1
    assert 2 < made.high < 3.5
    assert scale([values[0], dataclasses.replace(wild, value=300.0)], 0, 100).log


# The page ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "unit", "name", "text"),
    [
        (0.6341, "share", "accuracy", "63.4%"),
        (0.02, "share of dense", "KV", "2.00%"),
        (1.3249, "", "prefill speed-up", "1.325×"),
        (2.04149, "nats/token", "loss", "2.041"),
        (12345.6, "", "", "12,346"),
        (-0.5, "", "", "−0.5000"),
        (0.00001234, "", "", "1.234e−5"),
        (math.nan, "", "", "not a number"),
        (math.inf, "", "", "∞"),
        (0.0, "", "", "0"),
    ],
)
def test_numbers_as_people_read_them(value, unit, name, text):
    assert numbers.number(value, unit, name) == text


def test_durations():
    assert [numbers.duration(s) for s in (0.42, 42, 185, 7390)] == ["0.4 s", "42 s", "3:05 min", "2:03:10 h"]


def embedded(page):
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(data, parse_constant=refuse)


def test_the_page_holds_everything_and_no_markup_of_a_stranger(tmp_path):
    results = read_results(cases.realistic(tmp_path / "out"))
    page = render_study(results)
    assert "<img" not in page
    assert "<b>qwen" not in page
    assert 'onerror="' not in page
    assert page.count("</script>") == 2
    assert page.count("<script") == 2
    # In tags, attributes' texts aside: every address is a place on the page, or the empty icon.
    tags = [re.sub(r'(?:title|aria-label|data-t)="[^"]*"', "", tag) for tag in re.findall(r"<[a-z][^<>]*>", page)]
    assert set(re.findall(r"(?:src|href)=(\S+?)[\s>]", " ".join(tags))) == {'"data:,"', '"#trouble"', '"#where"'}
    data = embedded(page)
    assert len(data["cells"]) == len(results.cells) == 132
    failed = [c for c in data["cells"] if c["status"] == "failed"]
    assert len(failed) == 6
    assert all(EVIL in data["texts"][c["traceback"]] for c in failed)
    first = data["cells"][0]
    assert list(first["figures"]) == ["loss", "perplexity", "flops_share"]
    assert first["items"]["loss"]["n"] == 40
    assert sum(first["items"]["loss"]["bins"]) == 40
    assert data["settings"][first["settings"]["method"]]["use"] == "dense"
    assert any(c["figures"].get("loss", [0])[0] == "not a number" for c in data["cells"])
    assert "Slide rule" in page
    assert "do not compare" in page
    assert "Still to run" in page
    assert "random weights" not in page


def test_a_shrunk_run_says_so_at_the_top(tmp_path):
    rows = [(cell("m", DENSE, STORIES, shrink=True), loss([1.0, 2.0]))]
    page = render_study(read(tmp_path, *rows, shrink=True))
    assert page.index("These figures mean nothing") < page.index("<main>")
    assert "<title>SHRUNK" in page


def test_a_thousand_cells_stay_small_and_are_made_soon(tmp_path):
    tasks = [variant(f"task{i}") for i in range(5)]
    answers = [{"prompt": "word " * 300, "answer": "word " * 200} for _ in range(5)]
    scores = {"loss": {str(i): float(i % 7) for i in range(50)}}
    result = done({"loss": Figure(3.0, 2.5, 3.5, 50, "lower")}, scores, details={"answers": answers})
    methods = [variant("dense"), *(variant("m", budget=b / 100) for b in range(99))]
    rows = [(cell(f"model{i}", m, t), result) for i in range(2) for m in methods for t in tasks]
    assert len(rows) == 1000
    path = tmp_path / "report.html"
    write_study_report(read(tmp_path / "out", *rows), path)
    assert path.stat().st_size < 8_000_000
    assert "results.sqlite has all of it" in path.read_text()


def test_long_details_are_shortened_and_say_so():
    assert bounded({"a": "x" * 10}, 100) == {"a": "x" * 10}
    short = bounded({"a": "x" * 9_000, "b": list(range(900))}, 600)
    assert len(json.dumps(short)) <= 600
    assert "shortened" in short["a"]
    assert short["b"][-1].endswith("more")


def test_items_in_a_nutshell():
    found = summary([0.0, 1.0, 2.0, 3.0, 4.0, math.nan])
    assert (found["n"], found["no_number"], found["mean"]) == (6, 1, 2.0)
    assert found["quartiles"] == [1.0, 2.0, 3.0]
    assert summary([math.nan]) == {"n": 1, "no_number": 1}
    assert summary([2.0, 2.0])["bins"] == [2]


def test_a_study_without_results_and_a_folder_without_study(tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        read_results(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="does not exist"):
        read_results(tmp_path)
    with Store(tmp_path / "results.sqlite", create=True):
        pass
    assert render_study(read_results(tmp_path)).count("</html>") == 1
