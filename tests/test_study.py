"""The study: its YAML and its errors, its cells and their keys, its store, and running them in one process."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from sparing import zoo
from sparing.evaluate.task import Figure, Outcome
from sparing.evaluate.tasks import registry
from sparing.study import Store, Study, read_study
from sparing.study.cells import cells_of
from sparing.study.methods import known as methods_room
from sparing.study.store import Result
from sparing.study.trainings import known as training_room
from study_cases import PAGE, SMALL, Counting, Halve, NormMean, Nudge, written

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture
def toys(monkeypatch):
    """Toy tasks, methods and trainings under names of their own, as an installed package would add them."""
    tasks = dict(registry.known_tasks())
    found = {**tasks, "counting": Counting, "norm": NormMean}
    monkeypatch.setattr("sparing.study.spec.known_tasks", lambda: found)
    monkeypatch.setattr(methods_room, "OURS", {**methods_room.OURS, "halve": Halve})
    monkeypatch.setattr(training_room, "OURS", {**training_room.OURS, "nudge": Nudge})


def study(tmp_path: Path, methods: str, tasks: str, more: str = "") -> Study:
    text = f"study: toy\nmodels: {{llama: {{path: arithmetic-llama}}}}\n{more}\nmethods:\n{methods}\ntasks:\n{tasks}\n"
    return Study(written(tmp_path, text), tmp_path / "out")


def counted(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


# The YAML ---------------------------------------------------------------------------------------------------------------


def test_the_grid_is_the_product_with_one_seed_where_nothing_is_random(tmp_path):
    spec = read_study(written(tmp_path))
    cells = cells_of(spec)
    # dense and three skips are not seeded; random is: (1 + 3 + 2) subjects, two tasks.
    assert len(cells) == 12
    assert [c.seed for c in cells if c.method.name == "skip"] == [None] * 6
    assert sorted(c.seed for c in cells if c.method.name == "random") == [0, 0, 1, 1]
    assert len({c.subject for c in cells}) == 6
    assert len({c.key for c in cells}) == 12
    # Cells of one subject stand together, so that it is made once.
    order = [c.subject for c in cells]
    assert sum(a != b for a, b in itertools.pairwise(order)) == 5


@pytest.mark.parametrize(
    ("change", "line", "message"),
    [
        (("use: dense", "use: dens"), 7, "did you mean dense"),
        (("use: SkipModules", "use: SkipModule"), 9, "did you mean SkipModules"),
        (("{attention: [[1]", "{atention: [[1]"), 10, "did you mean attention"),
        (("window: 64, max_tokens: 512}", "windw: 64, max_tokens: 512}"), 17, "did you mean window"),
        (("budget: 0.8", "budget: much"), 13, "valid number"),
        (("budget: 0.8", "budget: 1.8"), 13, "share of the operations"),
        (("use: perplexity", "use: perplexty"), 16, "did you mean perplexity"),
        (("seeds: [0, 1]", "seeds: [1, 1]"), 3, "a seed stands there twice"),
        (("path: arithmetic-llama", "path: ./nowhere"), 5, "the model's folder .*nowhere does not exist"),
        (("window: 32", "window: 3"), 21, "at least 8"),
        ((f"with: {{text: {PAGE}, window: 32", "with: {text: nowhere.txt, window: 32"), 21, "does not exist"),
        ((f"with: {{text: {PAGE}, window: 32", "with: {window: 32"), 21, "`text` is missing"),
        (("seeds: [0, 1]", "seeds: []"), 3, "at least 1 item"),
        (("seeds: [0, 1]", "seed: [0, 1]"), 3, "did you mean seeds"),
        (("  short:", "  page:"), 18, "written twice"),
        (("study: small", "study: small\nbaseline: dence"), 3, "did you mean dense"),
        (("{use: dense}", "{use: dense, tasks: [pages]}"), 7, "did you mean page"),
        (("path: arithmetic-llama", "path: '{dta}/model'"), 5, "no path is called 'dta'"),
        (("study: small", "study: ["), 3, "not valid YAML"),
    ],
)
def test_what_is_wrong_with_a_study_is_said_with_its_line_and_the_nearest_name(tmp_path, change, line, message):
    old, new = change
    assert old in SMALL
    path = written(tmp_path, SMALL.strip().replace(old, new, 1) + "\n")
    # Lines are counted as in the file.
    with pytest.raises(ValueError, match=message) as caught:
        read_study(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    stated = int(str(caught.value).split("line ")[1].split(":")[0])
    assert abs(stated - (line - 1)) <= 1, str(caught.value)


def test_a_folder_of_paths_can_be_a_whole_value(tmp_path):
    with pytest.raises(ValueError, match=f"expected MNIST in {tmp_path}/pictures/mnist"):
        study(
            tmp_path, "  dense: {use: dense}", '  a: {use: scenes, with: {data: "{data}"}}', "paths: {data: pictures}"
        )
    with pytest.raises(ValueError, match="dota"):
        study(
            tmp_path, "  dense: {use: dense}", '  a: {use: scenes, with: {data: "{dota}"}}', "paths: {data: pictures}"
        )


def test_a_file_that_is_no_study(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_study(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="is a folder"):
        read_study(tmp_path)
    with pytest.raises(ValueError, match="no study"):
        read_study(written(tmp_path, "- 1\n"))
    with pytest.raises(ValueError, match="`study` is missing"):
        read_study(written(tmp_path, "models: {}\n"))


def test_two_cells_alike_are_refused_with_both_names(tmp_path):
    text = SMALL.replace("  dense: {use: dense}", "  dense: {use: dense}\n  again: {use: dense}")
    with pytest.raises(ValueError, match=r"two cells are alike, .*dense.* and .*again"):
        Study(written(tmp_path, text), tmp_path / "out")


def test_keys_follow_content_and_not_names_or_places(tmp_path):
    """Renaming and moving recomputes nothing; another text, setting, model or seed does."""
    copy = tmp_path / "copy.txt"
    copy.write_bytes(PAGE.read_bytes())
    keys = [c.key for c in cells_of(read_study(written(tmp_path)))]
    moved = SMALL.replace(str(PAGE), str(copy)).replace("  page:", "  seite:").replace("  llama:", "  lama:")
    assert [c.key for c in cells_of(read_study(written(tmp_path, moved, "moved.yaml")))] == keys
    copy.write_text(copy.read_text() + " more")
    changed = [c.key for c in cells_of(read_study(written(tmp_path, moved, "moved.yaml")))]
    assert not set(changed) & set(keys)
    other = [c.key for c in cells_of(read_study(written(tmp_path, SMALL.replace("[1, 2]]", "[1, 3]]"))))]
    assert sum(a != b for a, b in zip(keys, other, strict=True)) == 2
    seeds = [c.key for c in cells_of(read_study(written(tmp_path, SMALL.replace("[0, 1]", "[0, 2]"))))]
    assert sum(a != b for a, b in zip(keys, seeds, strict=True)) == 2
    assert not set(keys) & {c.key for c in cells_of(read_study(written(tmp_path)), shrink=True)}


def test_a_model_with_a_seed_in_its_path_is_one_checkpoint_a_seed(tmp_path):
    for seed, layer in ((0, "a"), (1, "b")):
        folder = shutil.copytree(zoo.path("arithmetic-llama"), tmp_path / f"run{seed}" / "final")
        (folder / "README.md").write_text(layer)
        (folder / "more.txt").write_text(layer)
    text = """
        study: seeds
        seeds: [0, 1]
        models: {llama: {path: "run{seed}/final"}}
        methods: {dense: {use: dense}, skip: {use: SkipModules, with: {attention: [1]}}}
        tasks: {page: {use: perplexity, with: {text: PAGE, window: 64, max_tokens: 128}}}
    """
    spec = read_study(written(tmp_path, text.replace("PAGE", str(PAGE))))
    cells = cells_of(spec)
    assert [(cell.method.name, cell.seed) for cell in cells] == [("dense", 0), ("dense", 1), ("skip", 0), ("skip", 1)]
    assert [Path(cell.checkpoint.path).parent.name for cell in cells] == ["run0", "run1"] * 2
    assert len({cell.subject for cell in cells}) == 4
    # The content decides, not the folder's name.
    before = {(cell.method.name, cell.seed): cell.key for cell in cells}
    (tmp_path / "run1" / "final" / "more.txt").write_text("c")
    after = {(cell.method.name, cell.seed): cell.key for cell in cells_of(spec)}
    assert {key for key in before if before[key] != after[key]} == {("dense", 1), ("skip", 1)}
    assert cells_of(spec, shrink=True)


def test_restrictions_leave_cells_out(tmp_path, toys):
    log = tmp_path / "log"
    job = study(
        tmp_path,
        "  dense: {use: dense, training: [none]}\n  other: {use: SkipModules, with: {attention: [0]}, tasks: [b], training: [bit]}",
        f"  a: {{use: norm}}\n  b: {{use: counting, with: {{log: '{log}'}}}}",
        f"training: {{bit: {{use: nudge, with: {{log: '{log}'}}}}}}",
    )
    assert [(c.method.name, c.training and c.training.name, c.task.name) for c in job.cells] == [
        ("dense", None, "a"),
        ("dense", None, "b"),
        ("other", "bit", "b"),
    ]


# Running ----------------------------------------------------------------------------------------------------------------


def test_a_study_runs_resumes_and_recomputes_nothing(tmp_path):
    job = Study(written(tmp_path), tmp_path / "out")
    assert set(job.run().values()) == {"done"}
    before = {stored.key: stored.result.started for stored in job.results()}
    assert len(before) == 12
    again = Study(tmp_path / "out")
    assert again.pending() == []
    again.run()
    assert {stored.key: stored.result.started for stored in again.results()} == before
    loss = {s.label: s.result.outcome.figures["loss"].value for s in job.results()}
    assert loss["llama · dense · page"] < loss["llama · skip (attention=[1, 2]) · page"]
    random = {s.result.details["method"]["plan"] for s in job.results() if s.method == "random"}
    assert len(random) == 2, "two seeds draw two plans"
    # A cell more: only it is run.
    more = written(tmp_path, SMALL.replace("[1, 2]]", "[1, 2], [3]]"))
    grown = Study(more, tmp_path / "out")
    assert [cell.method.varied for cell in grown.pending()] == [{"attention": [3]}] * 2


def test_figures_do_not_depend_on_what_ran_before(tmp_path):
    whole = Study(written(tmp_path), tmp_path / "whole")
    whole.run()
    parts = Study(written(tmp_path), tmp_path / "parts")
    for cell in reversed(parts.cells):
        parts.run(only=[cell.key])
    for one, two in zip(whole.results(), parts.results(), strict=True):
        assert one.key == two.key
        assert one.result.outcome == two.result.outcome


def test_failures_are_kept_and_do_not_stop_the_rest(tmp_path, toys):
    log = tmp_path / "log"
    job = study(
        tmp_path,
        "  dense: {use: dense}\n  far: {use: SkipModules, with: {attention: [99]}}",
        f"  bad: {{use: counting, with: {{log: '{log}', error: broke}}}}\n"
        f"  none: {{use: counting, with: {{log: '{log}', not_for: no pictures}}}}\n"
        f"  full: {{use: counting, with: {{log: '{log}', error: memory}}}}\n"
        "  good: {use: norm}",
    )
    job.run()
    found = {(s.method, s.task): s.result for s in job.results()}
    assert (found["dense", "bad"].status, found["dense", "bad"].error) == ("failed", "RuntimeError: broke")
    assert "study_cases.py" in found["dense", "bad"].traceback
    assert (found["dense", "none"].status, found["dense", "none"].error) == ("not applicable", "no pictures")
    assert found["dense", "full"].status == "failed"
    assert found["dense", "good"].status == "done", found["dense", "good"].traceback
    assert {found["far", t].status for t in ("bad", "none", "full", "good")} == {"not applicable"}
    assert "layer 99 does not exist" in found["far", "good"].error
    tries = counted(log)
    job.run()
    assert counted(log) == tries, "failed cells are not tried again unasked"
    assert {c.task.name for c in job.pending(again=True)} == {"bad", "full"}
    job.run(again=True)
    assert counted(log) == tries + 2


def test_arguments_of_a_wrong_type_fail_with_the_policys_name(tmp_path, toys):
    job = study(tmp_path, "  odd: {use: SkipModules, with: {attention: five}}", "  norm: {use: norm}")
    job.run()
    (failed,) = job.results()
    assert failed.result.status == "failed"
    assert re.search(
        r"SkipModules cannot be made of \{'attention': 'five'\}: .*; mend their types", failed.result.error
    )


def test_the_drivers_threads_decide_nothing(tmp_path):
    machine = {"cpu": "Abacus", "cores": 2, "threads": 1}
    path = written(tmp_path, SMALL + "  speed: {use: speed, with: {prompt: 16, steps: 2, batches: [1], repeats: 1}}\n")
    one, two, other = (
        {c.key for c in Study(path, tmp_path / "o", environment={"hardware": {**machine, **change}}).cells}
        for change in ({}, {"threads": 8}, {"cores": 4})
    )
    assert one == two
    assert len(one & other) == len(one) - 6, "cells that are timed"


def test_methods_that_change_weights_leave_the_next_one_a_fresh_model(tmp_path, toys):
    job = study(tmp_path, "  halve: {use: halve}\n  dense: {use: dense}", "  norm: {use: norm}")
    job.run()
    halved, dense = (s.result.outcome.figures["mean"].value for s in job.results())
    assert halved == pytest.approx(dense / 2, rel=1e-2)


def test_training_happens_once_a_subject_and_its_result_is_kept(tmp_path, toys):
    log = tmp_path / "log"
    job = study(
        tmp_path,
        "  dense: {use: dense}\n  skip: {use: SkipModules, with: {attention: [1]}, training: [bit]}",
        "  one: {use: norm}\n  two: {use: perplexity, with: {text: '" + str(PAGE) + "', window: 32, max_tokens: 256}}",
        f"seeds: [0, 1]\ntraining: {{bit: {{use: nudge, with: {{log: '{log}'}}}}}}",
    )
    job.run()
    mean = {
        (s.method, s.training, s.seed): s.result.outcome.figures["mean"].value for s in job.results() if s.task == "one"
    }
    assert set(mean) == {
        ("dense", "none", None),
        ("dense", "bit", 0),
        ("dense", "bit", 1),
        ("skip", "bit", 0),
        ("skip", "bit", 1),
    }
    assert mean["dense", "bit", 0] == pytest.approx(mean["dense", "none", None] + 0.25, abs=0.01)
    assert mean["dense", "bit", 1] == pytest.approx(mean["dense", "none", None] + 0.5, abs=0.01)
    assert counted(log) == 4
    # Lost results, kept weights: nothing is trained again, and policies come back with the checkpoint.
    loss = {s.key: s.result.outcome.figures["loss"].value for s in job.results() if s.task == "two"}
    (job.out / "results.sqlite").unlink()
    job.run()
    assert counted(log) == 4
    again = {s.key: s.result.outcome.figures["loss"].value for s in job.results() if s.task == "two"}
    assert again == pytest.approx(loss, rel=1e-3)


def test_ctrl_c_keeps_what_was_finished(tmp_path, toys):
    log = tmp_path / "log"
    job = study(
        tmp_path,
        "  dense: {use: dense}",
        f"  a: {{use: norm}}\n  b: {{use: counting, with: {{log: '{log}', error: interrupt}}}}\n  c: {{use: norm, models: []}}",
    )
    with pytest.raises(KeyboardInterrupt):
        job.run()
    assert [s.task for s in job.results()] == ["a"]
    assert [c.task.name for c in job.pending()] == ["b"]


def test_the_estimate_counts_what_is_known(tmp_path):
    job = Study(written(tmp_path), tmp_path / "out")
    first = job.estimate(job.pending())
    assert (first.measured, first.guessed, first.unknown) == (0, 12, 0)
    assert first.seconds > 0
    job.run(only=[cell.key for cell in job.cells if cell.task.name == "page"][:2])
    then = job.estimate(job.pending())
    assert (then.measured, then.guessed) == (4, 6)


# The folder and the file ------------------------------------------------------------------------------------------------


def test_another_study_or_a_shrunk_one_is_not_mixed_in(tmp_path):
    path = written(tmp_path)
    Study(path, tmp_path / "out", shrink=True).run(only=[])
    with pytest.raises(ValueError, match="add --shrink"):
        Study(path, tmp_path / "out").run()
    other = written(tmp_path, SMALL.replace("study: small", "study: other"), "other.yaml")
    with pytest.raises(ValueError, match="holds the study 'small'"):
        Study(other, tmp_path / "out", shrink=True).run()
    # From the folder alone the right one goes on.
    assert Study(tmp_path / "out").shrink


def test_two_runs_at_once_are_refused(tmp_path):
    job = Study(written(tmp_path), tmp_path / "out")
    code = f"""
import sys
from filelock import FileLock
lock = FileLock({str(tmp_path / "out" / ".lock")!r})
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""
    (tmp_path / "out").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process is running"):
            job.run(only=[])
        other.kill()
    job.run(only=[])


def test_files_that_are_not_ours_are_left_alone(tmp_path):
    path = tmp_path / "results.sqlite"
    path.write_bytes(b"no database at all, but long enough to be looked at" * 10)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="no SQLite file, or is damaged"):
        Store(path, create=True)
    assert path.read_bytes() == before
    path.unlink()
    with sqlite3.connect(path) as base:
        base.execute("CREATE TABLE theirs(x)")
    base.close()
    with pytest.raises(ValueError, match="no results of a study"):
        Store(path, create=True)
    with pytest.raises(ValueError, match="does not exist"):
        Store(tmp_path / "none.sqlite")
    with pytest.raises(ValueError, match="is a folder"):
        Store(tmp_path)


@pytest.mark.parametrize(("version", "age"), [(0, "older"), (99, "newer")])
def test_results_of_another_version_are_refused(tmp_path, version, age):
    path = tmp_path / "results.sqlite"
    Store(path, create=True).close()
    with sqlite3.connect(path) as base:
        base.execute(f"PRAGMA user_version = {version}")
    base.close()
    with pytest.raises(ValueError, match=f"an? {age} sparing"):
        Store(path, create=True)


def test_a_locked_file_is_waited_for_and_then_named(tmp_path):
    job = Study(written(tmp_path), tmp_path / "out")
    job.run(only=[])
    base = sqlite3.connect(tmp_path / "out" / "results.sqlite", isolation_level=None)
    base.execute("BEGIN EXCLUSIVE")
    with pytest.raises(ValueError, match="locked by another program"):
        Store(tmp_path / "out" / "results.sqlite", patience=0.2)
    base.execute("ROLLBACK")
    base.close()
    Store(tmp_path / "out" / "results.sqlite", patience=0.2).close()


def test_the_store_gives_back_what_was_put(tmp_path):
    cell = cells_of(read_study(written(tmp_path)))[0]
    outcome = Outcome(
        {"b": Figure(0.5, 0.25, 0.75, 8, "higher", "share"), "a": Figure(float("nan")), "c": Figure(float("inf"))},
        {"b": {"x": 1.0, "y": 0.0, "z": float("nan")}},
        {"note": "é", "nan": float("nan")},
    )
    with Store(tmp_path / "r.sqlite", create=True) as store:
        store.put(cell, Result("failed", error="first"))
        store.put(cell, Result("done", outcome, seconds=1.5, environment={"cpu": "x"}, details={"method": {"plan": 1}}))
        (found,) = store.cells()
        assert store.statuses() == {cell.key: "done"}
    assert list(found.result.outcome.figures) == ["b", "a", "c"]
    assert found.result.outcome.figures["b"] == outcome.figures["b"]
    assert found.result.outcome.figures["a"].value != found.result.outcome.figures["a"].value
    assert found.result.outcome.figures["c"].value == float("inf")
    assert dict(found.result.outcome.items["b"])["x"] == 1.0
    assert found.result.outcome.items["b"]["z"] != found.result.outcome.items["b"]["z"]
    assert found.result.outcome.details == {"note": "é", "nan": "nan"}
    assert found.result.details == {"method": {"plan": 1}}
    assert dict(found.result.environment) == {"cpu": "x"}
    assert dataclasses.asdict(found.result)["seconds"] == 1.5


STUDIES = sorted(path.name for path in RECIPES.glob("*.yaml") if "\nstudy: " in path.read_text())


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("data", ["here", "away"])
def test_the_recipes_run_shrunk_with_and_without_their_data(tmp_path, name, data):
    """Where the data is not on this machine, too: every cell has its own name and none fails."""
    source = (RECIPES / name).read_text()
    named = re.findall(r"^  (\w+): \.\./", source, re.MULTILINE)
    # One seed: the others are the same again.
    copy = tmp_path / name
    copy.write_text(re.sub(r"^seeds: .*$", "seeds: [0]", source, flags=re.MULTILINE))
    folders = {path: (RECIPES / re.search(rf"^  {path}: (.*)$", source, re.MULTILINE)[1]).resolve() for path in named}
    paths = folders if data == "here" else dict.fromkeys(named, tmp_path / "nowhere")
    job = Study(copy, tmp_path / "out", shrink=True, paths=paths)
    found = job.run()
    assert len(found) == len(job.cells)
    assert set(found.values()) <= {"done", "not applicable"}, [s.result.error for s in job.results()]
