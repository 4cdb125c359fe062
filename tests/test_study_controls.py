"""Matched controls: how the YAML pairs them, and what tables, page, terminal, export and diff say of arms against them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from sparing.cli import main
from sparing.evaluate.task import Figure
from sparing.study import Study, read_study
from sparing.study.comparison import compare_results
from sparing.study.conclusions import conclusions_of, sentences_of
from sparing.study.export import figures_table
from sparing.study.pages import render_study
from sparing.study.results import read_results
from sparing.study.store import Result
from sparing.study.tables import tables_of
from study_cases import PAGE, written
from study_results_cases import cell, done, loss, stored, variant

DENSE, STORIES = variant("dense"), variant("stories")
FRAME = """
study: paired
models: {{llama: {{path: arithmetic-llama}}}}
tasks: {{page: {{use: perplexity, with: {{text: {page}, window: 32, max_tokens: 256}}}}}}
methods:
  dense: {{use: dense}}
{methods}
"""


def spec(folder, methods):
    return read_study(written(folder, FRAME.format(page=PAGE, methods=methods)))


def pairs(folder, methods):
    found = spec(folder, methods)
    return {(found.methods[i].label, found.methods[j].label) for i, j in found.controls}


# The YAML ---------------------------------------------------------------------------------------------------------------


def test_variants_are_paired_by_the_settings_that_both_have(tmp_path):
    text = f"""
  greedy: {{use: skip_search, with: {{text: {PAGE}}}, over: {{budget: [0.9, 0.7], width: [1, 4]}}}}
  random: {{use: skip_random, with: {{text: {PAGE}, width: 4}}, over: {{budget: [0.7, 0.9]}}, control_of: slow}}
  slow: {{use: skip_search, with: {{text: {PAGE}, search: additive}}, over: {{budget: [0.9, 0.7]}}}}
"""
    assert pairs(tmp_path, text) == {
        ("slow (budget=0.9)", "random (budget=0.9)"),
        ("slow (budget=0.7)", "random (budget=0.7)"),
    }
    # What the control leaves at its default counts too: a search of another width is not what it matches.
    with pytest.raises(
        ValueError, match=r"line 9: 'greedy \(budget=0\.9, width=1\)' has no control: no variant of 'random' has"
    ):
        pairs(tmp_path, text.replace("control_of: slow", "control_of: [slow, greedy]"))


def test_any_policy_may_control_any_other_and_one_variant_all(tmp_path):
    found = pairs(
        tmp_path,
        """
  first: {use: SkipModules, over: {attention: [[1], [2]]}}
  second: {use: SkipModules, with: {mlp: [1]}}
  same: {use: SkipModules, with: {mlp: [3]}, over: {attention: [[2], [1]]}, control_of: first}
  late: {use: SkipGPT, control_of: [first, second]}
""",
    )
    assert found == {
        ("first (attention=[1])", "same (attention=[1])"),
        ("first (attention=[2])", "same (attention=[2])"),
        ("first (attention=[1])", "late"),
        ("first (attention=[2])", "late"),
        ("second", "late"),
    }


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ("control_of: greddy", "no method of this study is called 'greddy'; did you mean greedy"),
        ("control_of: random", "'random' cannot be its own control"),
        (
            "control_of: greedy, over: {budget: [0.9]}",
            r"'greedy \(budget=0.7\)' has no control: no variant of 'random' has budget: 0.7",
        ),
        (
            "control_of: greedy, over: {budget: [0.9, 0.7], window: [32, 64]}",
            r"'greedy \(budget=0.9\)' has no control: no variant of 'random' has budget: 0.9, window: 256",
        ),
        (
            "control_of: greedy, over: {budget: [0.9, 0.7], matches: [greedy, none]}",
            r"'greedy \(budget=0.9\)' has several controls, 'random \(budget=0.9, matches=greedy\)' and .*matches=none.*: keep one",
        ),
        (
            "control_of: greedy, over: {budget: [0.9, 0.7, 0.5]}",
            r"'random \(budget=0.5\)' is the control of no variant of 'greedy': take its value out",
        ),
        ("control_of: {greedy: 1}", "control_of"),
    ],
)
def test_what_cannot_be_paired_is_an_error_with_line_and_cure(tmp_path, control, message):
    text = f"""
  greedy: {{use: skip_search, with: {{text: {PAGE}}}, over: {{budget: [0.9, 0.7]}}}}
  random:
    use: skip_random
    with: {{text: {PAGE}}}
    {control.replace(", over", chr(10) + "    over")}
"""
    with pytest.raises(ValueError, match=f"study.yaml, line 12: .*(?:{message})"):
        spec(tmp_path, text)


def test_only_methods_have_controls(tmp_path):
    text = FRAME.format(page=PAGE, methods="").replace("max_tokens: 256}", "max_tokens: 256}, control_of: dense")
    with pytest.raises(ValueError, match="line 4: `control_of` is for methods"):
        read_study(written(tmp_path, text))


# A run ------------------------------------------------------------------------------------------------------------------


def test_a_run_keeps_the_pairs_and_a_later_one_adds_them_without_recomputing(tmp_path):
    methods = f"""
  skip: {{use: SkipModules, over: {{attention: [[1], [1, 2]]}}}}
  random: {{use: skip_random, with: {{text: {PAGE}, matches: none, max_tokens: 256, window: 32, budget: 0.8}}}}
"""
    path = written(tmp_path, FRAME.format(page=PAGE, methods=methods) + "seeds: [0, 1]\n")
    Study(path, tmp_path / "out").run()
    assert not read_results(tmp_path / "out").matched
    before = {s.key: s.result.started for s in Study(path, tmp_path / "out").results()}
    path.write_text(path.read_text().replace("budget: 0.8}", "budget: 0.8}, control_of: skip"))
    job = Study(path, tmp_path / "out")
    assert not job.pending()
    job.run()
    assert {s.key: s.result.started for s in job.results()} == before
    found = read_results(tmp_path / "out")
    assert {arm.label: [c.label for c in controls] for arm, controls in found.matched.items()} == {
        "skip (attention=[1])": ["random"],
        "skip (attention=[1, 2])": ["random"],
    }
    assert [arm.control for arm in dict.fromkeys(found.arms.values())] == [False, False, False, True]
    (table,) = tables_of(found)
    for arm, (entry,) in table.rows:
        assert [each.arm.label for each in entry.controls] == (["random"] if arm.method == "skip" else [])
        for each in entry.controls:
            losses = [c.result.outcome.figures["loss"].value for c in each.cells]
            assert len(losses) == 2
            assert each.difference.value == pytest.approx(entry.value.value - sum(losses) / 2, abs=1e-6)
            assert each.difference.basis.endswith("× 2 seeds")


# What is read from it ---------------------------------------------------------------------------------------------------


def study_of(folder, *, control=(2.0, 2.2, 2.4), chosen=1.0, **about):
    """An arm without seeds and its control with three; five items."""
    items = np.array([0.0, 0.1, 0.2, -0.1, -0.2])
    rows = [(cell("m", DENSE, STORIES), loss(list(items)))]
    rows += [(cell("m", variant("greedy", budget=0.7), STORIES), loss(list(items + chosen)))]
    rows += [
        (cell("m", variant("random", "skip_random", budget=0.7), STORIES, seed=s), loss(list(items + level)))
        for s, level in enumerate(control)
    ]
    return stored(folder, rows, control_of={"random": "greedy"}, **about)


def test_against_a_seeded_control_seeds_count_as_drawn_at_random(tmp_path):
    results = read_results(study_of(tmp_path))
    (table,) = tables_of(results)
    entry = next(entries[0] for arm, entries in table.rows if arm.method == "greedy")
    (against,) = entry.controls
    # Seed by seed -1.0, -1.2, -1.4, the same for every item: only the seeds vary.
    half = stats.t.ppf(0.975, 2) * 0.2 / math.sqrt(3)
    assert against.difference.value == pytest.approx(-1.2)
    assert (against.difference.low, against.difference.high) == (pytest.approx(-1.2 - half), pytest.approx(-1.2 + half))
    assert against.difference.verdict == "better"
    assert entry.against.verdict == "worse"
    assert table.verdicts() == {"worse": 2}
    assert table.control_verdicts() == {"better": 1}
    assert sentences_of(results) == [("stories", "against dense: 2 worse; against matched controls: 1 better")]
    assert [(c.arm, c.other) for c in conclusions_of(results).values()] == [
        ("greedy (budget=0.7)", "dense"),
        ("greedy (budget=0.7)", "random (budget=0.7)"),
        ("random (budget=0.7)", "dense"),
    ]


def test_seeds_that_scatter_leave_it_open(tmp_path):
    results = read_results(study_of(tmp_path, control=(0.5, 1.5, 3.0)))
    page = render_study(results)
    assert "Against the matched controls: 1 not told apart." in page
    assert "control: random (budget=0.7)" in page


def test_a_control_that_failed_is_told_and_not_compared(tmp_path):
    rows = [
        (cell("m", variant("greedy"), STORIES), loss([1.0, 2.0])),
        (cell("m", variant("random", "skip_random"), STORIES, seed=0), Result("failed", error="broke")),
    ]
    results = read_results(stored(tmp_path, rows, control_of={"random": "greedy"}, baseline="none"))
    (table,) = tables_of(results)
    assert not table.control_verdicts()
    assert "against its control random: that one has no figure" in render_study(results)


def test_controls_of_another_training_are_not_compared_with(tmp_path):
    heal = variant("heal")
    rows = [
        (cell("m", variant("greedy"), STORIES), loss([1.0, 2.0])),
        (cell("m", variant("greedy"), STORIES, training=heal), loss([1.0, 2.0])),
        (cell("m", variant("random", "skip_random"), STORIES, training=heal, seed=0), loss([1.5, 2.5])),
    ]
    results = read_results(stored(tmp_path, rows, control_of={"random": "greedy"}))
    assert [(a.label, [c.label for c in cs]) for a, cs in results.matched.items()] == [
        ("greedy · heal", ["random · heal"])
    ]


def test_the_page_and_the_export_name_the_control(tmp_path):
    results = read_results(study_of(tmp_path))
    page = render_study(results)
    assert 'class="c better"><span>random:</span> <em>better</em> −1.20' in page
    assert "against its control random (budget=0.7): −1.20, 95%: " in page
    assert 'class="control"' in page, "the control's stroke in the drawing"
    table = figures_table(results).to_pylist()
    assert {(row["method"], row["matched_control"]) for row in table} == {
        ("dense", None),
        ("greedy", "random (budget=0.7)"),
        ("random", None),
    }


def test_timed_figures_without_items_are_compared_by_their_intervals(tmp_path):
    def speed(value):
        return done({"prefill speed-up (batch 1)": Figure(value, value - 0.05, value + 0.05, 9, "higher")})

    task = variant("speed")
    rows = [(cell("m", variant("greedy"), task), speed(1.5))]
    rows += [
        (cell("m", variant("random", "skip_random"), task, seed=s), speed(v)) for s, v in enumerate([1.1, 1.11, 1.12])
    ]
    results = read_results(stored(tmp_path, rows, control_of={"random": "greedy"}, baseline="none"))
    (table,) = tables_of(results)
    (against,) = next(entries[0] for arm, entries in table.rows if arm.method == "greedy").controls
    assert (against.difference.verdict, against.difference.basis) == ("better", "the two intervals")


def test_report_and_diff_tell_what_they_conclude(tmp_path, capsys):
    first = study_of(tmp_path / "first")
    second = study_of(tmp_path / "second", control=(0.5, 1.5, 3.0))
    assert main(["study", "report", str(second)]) == 0
    assert "stories against dense: 1 worse, 1 not told apart; against matched controls: 1 not told apart" in " ".join(
        capsys.readouterr().out.split()
    )
    (changed, *_) = found = compare_results(*map(read_results, (first, second))).conclusions
    assert (changed.arm, changed.other, changed.first, changed.second) == (
        "greedy (budget=0.7)",
        "random (budget=0.7)",
        "better",
        "unsure",
    )
    assert len(found) == 2, "the control against dense too"
    assert main(["study", "diff", str(first), str(second), "--json", str(tmp_path / "d.json")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "greedy (budget=0.7): loss against random (budget=0.7): better → not told apart" in said
    assert json.loads((tmp_path / "d.json").read_text())["conclusions"][0]["second"] == "unsure"


def test_long_settings_that_begin_alike_are_arms_of_their_own(tmp_path):
    layers = list(range(40))
    found = spec(tmp_path, f"  skip: {{use: SkipModules, over: {{attention: [{layers}, {[*layers[:-1], 41]}]}}}}")
    one, two = (v.label for v in found.methods[1:])
    assert one != two
