"""A results file that is locked, a disk that is full, a cluster of several nodes: here and on Ray, what is kept and what is said."""

from __future__ import annotations

import functools
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from sparing.study import Store, Study
from sparing.study.export import export
from sparing.study.pages import render_study
from sparing.study.results import read_results
from sparing.study.study import Silent
from study_cases import PAGE, written

pytestmark = [
    # Ray 2.50 announces on every start what it will do one day, and leaves its own processes to the garbage collector.
    pytest.mark.filterwarnings("ignore:Tip. In future versions of Ray:FutureWarning"),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
FEW = f"""
study: few
seeds: [0, 1]
models: {{llama: {{path: arithmetic-llama}}}}
methods:
  dense: {{use: dense}}
  skip: {{use: SkipModules, over: {{attention: [[1], [2]]}}}}
tasks:
  page: {{use: perplexity, with: {{text: {PAGE}, window: 16, max_tokens: 2048}}}}
"""
ON = ["local", pytest.param("ray", marks=pytest.mark.skipif("not __import__('importlib').util.find_spec('ray')"))]


class Locker(Silent):
    """Another program that takes the file when the first result is in it."""

    def __init__(self, path: Path) -> None:
        self.base = sqlite3.connect(path, isolation_level=None)

    def finished(self, cell, result):
        self.base.execute("BEGIN EXCLUSIVE")


class Counting(Silent):
    def __init__(self) -> None:
        self.kept = []

    def finished(self, cell, result):
        self.kept.append(cell.key)


class SmallDisk(Store):
    """A store on a disk that has room for a result or two: SQLite itself says when it is full."""

    def __init__(self, path, **settings):
        super().__init__(path, **settings)
        # Six of them are there before the first result.
        self._base.execute("PRAGMA max_page_count = 8")


def whole(out: Path) -> list[str]:
    """The keys of the results that are there, from a file that SQLite finds in order."""
    with sqlite3.connect(out / "results.sqlite") as base:
        assert base.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert base.execute("PRAGMA foreign_key_check").fetchall() == []
    base.close()
    with Store(out / "results.sqlite") as store:
        return [stored.key for stored in store.cells() if stored.result.outcome.items["loss"]]


def no_cluster_is_left() -> bool:
    ray = sys.modules.get("ray")
    return ray is None or not ray.is_initialized()


@pytest.mark.parametrize("on", ON)
def test_a_file_that_is_locked_in_the_middle_ends_the_run_with_a_line(tmp_path, monkeypatch, on):
    job = Study(written(tmp_path, FEW), tmp_path / "out")
    job.run(only=[])
    monkeypatch.setattr("sparing.study.study.Store", functools.partial(Store, patience=0.2))
    locker = Locker(tmp_path / "out" / "results.sqlite")
    with pytest.raises(
        ValueError, match=r"results.sqlite is locked by another program \(waited 0.2 s\): close"
    ) as caught:
        job.run(on=on, watcher=locker)
    assert "\n" not in str(caught.value)
    assert no_cluster_is_left(), "workers go on for nobody"
    locker.base.execute("ROLLBACK")
    locker.base.close()
    (first,) = whole(tmp_path / "out")
    watcher = Counting()
    assert set(job.run(on="local", watcher=watcher).values()) == {"done"}
    assert first not in watcher.kept
    assert len(whole(tmp_path / "out")) == 3


@pytest.mark.parametrize("on", ON)
def test_a_disk_that_is_full_keeps_the_earlier_results_whole(tmp_path, monkeypatch, on):
    job = Study(written(tmp_path, FEW), tmp_path / "out")
    watcher = Counting()
    monkeypatch.setattr("sparing.study.study.Store", SmallDisk)
    with pytest.raises(ValueError, match=r"no space left on the disk: what it holds is whole; free space and resume"):
        job.run(on=on, watcher=watcher)
    assert no_cluster_is_left()
    assert 0 < len(watcher.kept) < 3
    assert set(whole(tmp_path / "out")) == set(watcher.kept)
    monkeypatch.undo()
    again = Counting()
    assert set(job.run(on="local", watcher=again).values()) == {"done"}
    assert not set(again.kept) & set(watcher.kept)


@pytest.mark.skipif(sys.platform == "win32", reason="limits file sizes as Unix does")
def test_the_command_says_it_in_a_line_where_files_may_not_grow(tmp_path):
    import resource

    path, out = written(tmp_path, FEW), tmp_path / "out"

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    command = [sys.executable, "-c", "import sys; from sparing.cli import main; sys.exit(main())"]
    words = ["study", "run", str(path), "--out", str(out)]
    ended = subprocess.run([*command, *words], preexec_fn=small, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("\n") == 1
    assert "perhaps no space left): look at the disk, and resume" in ended.stderr
    kept = whole(out)
    assert len(kept) < 3
    assert Study(path, out).run(only=[]) == dict.fromkeys(kept, "done")


def test_a_run_on_two_nodes_says_which_and_is_exported(tmp_path):
    ray = pytest.importorskip("ray")
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    from pyarrow import csv, parquet

    path = written(tmp_path, FEW)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "node_name": "left"})
    try:
        if len(cores) > 1:
            # What a node may use is its own.
            os.sched_setaffinity(0, {min(cores)})
        cluster.add_node(num_cpus=1, node_name="right")
        if cores:
            os.sched_setaffinity(0, cores)
        cluster.wait_for_nodes()
        assert set(Study(path, tmp_path / "ray").run(on="ray", address=cluster.address).values()) == {"done"}
    finally:
        if cores:
            os.sched_setaffinity(0, cores)
        ray.shutdown()
        cluster.shutdown()
    Study(path, tmp_path / "local").run()
    found, local = read_results(tmp_path / "ray"), read_results(tmp_path / "local")
    tables = {}
    for kind in ("parquet", "csv"):
        figures, items = export(found, tmp_path / kind, format=kind, items=True)
        read = parquet.read_table if kind == "parquet" else csv.read_csv
        tables[kind] = read(figures).to_pylist(), read(items).to_pylist()
    (rows, scores), (_, csv_scores) = tables["parquet"], tables["csv"]
    assert {row["environment.node"] for row in rows} == {"left", "right"}
    of_node = {row["environment.node"]: row["environment.hardware.cores"] for row in rows}
    assert of_node == ({"left": len(cores), "right": 1} if len(cores) > 1 else of_node)
    assert {row["environment.hardware.threads"] for row in rows} == {1}
    expected = {
        (c.key, n): f.value for c in local.cells for n, f in c.result.outcome.figures.items() if f.unit != "seconds"
    }
    assert {(row["cell"], row["figure"]): row["value"] for row in rows if row["unit"] != "seconds"} == expected
    assert [row["score"] for row in csv_scores] == pytest.approx([row["score"] for row in scores])
    assert len(tables["csv"][0]) == len(rows)
    page = render_study(found)
    assert "left <small" in page
    assert ("ran on different set-ups" in page) == (len(cores) > 1)
