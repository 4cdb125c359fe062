"""Two folders side by side, results for other programs, and the commands that read a study."""

from __future__ import annotations

import dataclasses
import json
import math

import pandas
import pytest
import typer
from pyarrow import parquet

import study_results_cases as cases
from sparing.cli import errors
from sparing.cli.study_reading import diff, export, report
from sparing.evaluate.task import Figure
from sparing.study.comparison import compare_results
from sparing.study.export import export as write
from sparing.study.export import figures_table, items_table
from sparing.study.results import read_results
from sparing.study.store import Result
from study_results_cases import ENVIRONMENT, OTHER, cell, done, loss, stored, variant

DENSE, SEARCH, RANDOM = variant("dense"), variant("search", "skip_search"), variant("random", "skip_random", budget=0.5)
STORIES, SPEED = variant("stories"), variant("speed")
LEVELS = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


@pytest.fixture
def app():
    made = typer.Typer(pretty_exceptions_enable=False)
    for command in (report, diff, export):
        made.command()(command)
    return made


def run(app, *words):
    return errors.run(app, [str(word) for word in words], debug=False)


@pytest.fixture
def two(tmp_path):
    """A run and a later one, with every kind of difference."""

    def speed(value, half=0.1):
        return done({"speed-up": Figure(value, value - half, value + half, 9, "higher")})

    lower = [level - 0.5 - 0.01 * i for i, level in enumerate(LEVELS)]
    higher = [level + 0.4 + 0.01 * i for i, level in enumerate(LEVELS)]
    first = [
        (cell("m", DENSE, STORIES), loss(LEVELS)),
        (cell("m", SEARCH, STORIES), loss(LEVELS)),
        (cell("m", RANDOM, STORIES, seed=0), loss(LEVELS)),
        (cell("m", RANDOM, STORIES, seed=1), loss(LEVELS)),
        (cell("m", DENSE, SPEED), speed(1.0)),
        (cell("m", SEARCH, SPEED), speed(1.5)),
        (cell("m", RANDOM, SPEED, seed=0), speed(1.5)),
        (cell("m", variant("gone"), STORIES), loss(LEVELS)),
    ]
    second = [
        (cell("m", DENSE, STORIES), dataclasses.replace(loss(LEVELS), environment=OTHER)),
        (cell("m", SEARCH, STORIES), loss(higher)),
        (cell("m", RANDOM, STORIES, seed=0), loss(lower)),
        (cell("m", RANDOM, STORIES, seed=1), Result("failed", error="OSError: disk", environment=ENVIRONMENT)),
        (cell("m", DENSE, SPEED), speed(1.05)),
        (cell("m", SEARCH, SPEED, salt="other weights"), speed(1.8)),
        (cell("m", RANDOM, SPEED, seed=0), speed(1.2)),
        (cell("m", variant("new"), STORIES), loss(LEVELS)),
    ]
    return stored(tmp_path / "first", first), stored(tmp_path / "second", second)


# The comparison ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_difference_is_told(two):
    found = compare_results(*map(read_results, two))
    assert found.only_first == ("m · gone · stories",)
    assert found.only_second == ("m · new · stories",)
    assert found.changed_content == ("m · search · speed",)
    assert [(s.label, s.first, s.second, s.error) for s in found.statuses] == [
        ("m · random (budget=0.5) · stories · seed 1", "done", "failed", "OSError: disk")
    ]
    told = [(c.label, c.figure, c.verdict, c.content) for c in found.changes]
    assert told == [
        ("m · search · stories", "loss", "worse", "same"),
        ("m · random (budget=0.5) · speed · seed 0", "speed-up", "worse", "same"),
        ("m · random (budget=0.5) · stories · seed 0", "loss", "better", "same"),
        ("m · search · speed", "speed-up", "better", "changed"),
        ("m · dense · speed", "speed-up", "unsure", "same"),
        ("m · dense · stories", "loss", "same", "same"),
    ]
    by_label = {(c.label, c.figure): c for c in found.changes}
    search = by_label["m · search · stories", "loss"].difference
    assert search.value == pytest.approx(0.425)
    assert search.basis == "6 items"
    # All six items the same way: 2 of 64.
    assert search.p == pytest.approx(2 / 64)
    assert by_label["m · search · speed", "speed-up"].difference.low == pytest.approx(0.1)
    # Two figures that got worse, and a cell that now fails.
    assert found.worse == 3
    assert found.environments["hardware.cpu"] == ("Abacus 9000", "Abacus 9000 or Slide rule")


def test_a_folder_and_itself(two):
    found = compare_results(*[read_results(two[0])] * 2)
    assert {change.verdict for change in found.changes} == {"same"}
    assert found.worse == 0
    assert not any((found.only_first, found.only_second, found.statuses, found.environments))


def test_a_figure_that_stops_being_a_number_got_worse(tmp_path):
    rows = [[(cell("m", DENSE, STORIES), done({"loss": Figure(v, better="lower")}))] for v in (1.0, math.nan)]
    one, two = (read_results(stored(tmp_path / str(i), row)) for i, row in enumerate(rows))
    assert compare_results(one, two).worse == 1
    assert compare_results(two, one).worse == 0
    assert compare_results(two, two).worse == 0
    json.dumps(compare_results(one, two).as_dict(), allow_nan=False)


def test_without_an_interval_nothing_is_told_apart(tmp_path):
    rows = [[(cell("m", DENSE, STORIES), done({"flops": Figure(v, better="lower")}))] for v in (1.0, 9.0)]
    found = compare_results(*(read_results(stored(tmp_path / str(i), row)) for i, row in enumerate(rows)))
    assert (found.changes[0].verdict, found.worse) == ("unsure", 0)


# Export -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_other_programs_read_what_was_exported(tmp_path, format):
    results = read_results(cases.realistic(tmp_path / "study"))
    figures, items = write(results, tmp_path / "out", format=format, items=True)
    assert (figures.name, items.name) == (f"figures.{format}", f"items.{format}")
    read = pandas.read_csv if format == "csv" else pandas.read_parquet
    table = read(figures)
    done_cells = [c for c in results.cells if c.result.outcome is not None]
    assert len(table) == sum(len(c.result.outcome.figures) for c in done_cells) + len(results.cells) - len(done_cells)
    assert set(table[table["status"] == "failed"]["error"]) == {f"RuntimeError: broke {cases.EVIL}"}
    assert table[table["status"] != "done"]["figure"].isna().all()
    # Settings are columns: the mean loss at each budget is the results' own.
    stories = table[(table["figure"] == "loss") & (table["method"] == "search") & (table["model"] == "tiny-llama")]
    wanted = {
        c.varied["budget"]: c.result.outcome.figures["loss"].value
        for c in done_cells
        if (c.method, c.task, c.model) == ("search", "stories", "tiny-llama")
    }
    assert dict(zip(stories["method.with.budget"], stories["value"], strict=True)) == pytest.approx(wanted)
    assert set(stories["chosen.plan"]) == {"attention: 1, 3"}
    assert set(table["environment.hardware.cpu"]) == {"Abacus 9000", "Slide rule"}
    assert table["control"].sum() == (table["method"] == "random").sum()
    nan = table[(table["figure"] == "loss") & table["value"].isna()]
    assert list(nan["seed"]) == [2]
    scores = read(items)
    assert len(scores) == sum(len(s) for c in done_cells for s in c.result.outcome.items.values())
    first = scores[scores["cell"] == results.cells[0].key]
    assert dict(zip(first["item"], first["score"], strict=True)) == pytest.approx(
        dict(results.cells[0].result.outcome.items["loss"])
    )


def test_columns_have_one_type_each(tmp_path):
    methods = [variant("a", x=1, y=1, z=True), variant("b", x=0.5, y="one", z=None), variant("c", x=2, y=[1, 2])]
    results = read_results(stored(tmp_path / "s", [(cell("m", m, STORIES), loss(LEVELS)) for m in methods]))
    table = figures_table(results)
    assert table["method.with.x"].to_pylist() == [1.0, 0.5, 2.0]
    assert table["method.with.y"].to_pylist() == ["1", "one", "[1, 2]"]
    assert table["method.with.z"].to_pylist() == [True, None, None]
    assert table["seed"].to_pylist() == [None] * 3
    assert items_table(results)["score"].to_pylist() == LEVELS * 3


def test_an_interrupted_export_leaves_the_old_file(tmp_path, monkeypatch):
    results = read_results(stored(tmp_path / "s", [(cell("m", DENSE, STORIES), loss(LEVELS))]))
    (path,) = write(results, tmp_path, format="parquet")
    before = path.read_bytes()

    def broken(table, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(parquet, "write_table", broken)
    with pytest.raises(KeyboardInterrupt):
        write(results, tmp_path, format="parquet")
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figures.parquet", "s"]


# The commands -----------------------------------------------------------------------------------------------------------


def test_report_and_export_write_beside_the_results(app, two, capsys):
    assert run(app, "report", two[0]) == 0
    page = (two[0] / "report.html").read_text()
    assert "gone" in page
    assert run(app, "export", two[0], "--format", "parquet", "--items") == 0
    assert sorted(p.name for p in (two[0] / "export").iterdir()) == ["figures.parquet", "items.parquet"]
    said = capsys.readouterr().out
    assert "report.html" in said
    assert "items.parquet" in said


def test_diff_tells_and_fails_only_where_asked(app, two, capsys, tmp_path):
    assert run(app, "diff", *two, "--json", tmp_path / "diff.json") == 0
    said = capsys.readouterr().out
    for part in ("only in the first: 1 cell", "done → failed", "worse", "same name, other content", "Slide rule"):
        assert part in said
    content = json.loads((tmp_path / "diff.json").read_text())
    assert content["worse"] == 3
    assert content["figures"][0]["difference"]["value"] == pytest.approx(0.425)
    assert run(app, "diff", *two, "--fail-on-change") == 1
    assert run(app, "diff", two[0], two[0], "--fail-on-change") == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("report", "nowhere"), "nowhere is no folder"),
        (("report", "empty"), "does not exist: run the study first"),
        (("report", "first", "--out", "no/where.html"), "make it, or name another"),
        (("diff", "first", "empty"), "does not exist"),
        (("diff", "first", "second", "--json", "no/diff.json"), "make it, or name another"),
        (("export", "first", "--out", "file"), "'file' is a file"),
        (("export", "first", "--format", "xlsx"), "csv"),
    ],
)
def test_errors_take_one_line(app, two, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert run(app, *words) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
