"""A study that is killed, and one on a Ray cluster: what other processes see of it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparing.study import Store, Study
from study_cases import written

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from study import figures, killed

pytestmark = [
    # Ray 2.50 announces on every start what it will do one day, and leaves its own processes to the garbage collector.
    pytest.mark.filterwarnings("ignore:Tip. In future versions of Ray:FutureWarning"),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SPARING = [sys.executable, "-c", "import sys; from sparing.cli import main; sys.exit(main())"]


@pytest.fixture
def environment(monkeypatch):
    """Children with one thread each."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_a_kill_loses_at_most_the_running_cell_and_resuming_recomputes_none(tmp_path, environment):
    path = written(tmp_path)
    found = killed(path, tmp_path / "out", kills=2, draw=random.Random(3))
    assert found["lost_after_kill"] <= 1
    assert found["resumed_cells_recomputed"] == 0
    Study(path, tmp_path / "quiet").run()
    assert figures(tmp_path / "out") == figures(tmp_path / "quiet")


def test_cells_on_ray_give_the_same_figures(tmp_path, environment):
    pytest.importorskip("ray")
    path = written(tmp_path)
    local, ray = Study(path, tmp_path / "local"), Study(path, tmp_path / "ray")
    local.run()
    assert set(ray.run(on="ray").values()) == {"done"}
    assert figures(tmp_path / "ray") == figures(tmp_path / "local")
    assert ray.run(on="ray") == ray.run(on="local"), "nothing is left to run"


def test_a_cluster_that_cannot_hold_a_cell_is_refused_with_the_cure(tmp_path, environment):
    pytest.importorskip("ray")
    text = written(tmp_path).read_text().replace("seeds:", "cores: 4096\nseeds:")
    job = Study(written(tmp_path, text), tmp_path / "out")
    with pytest.raises(ValueError, match="a cell takes 4096 CPU"):
        job.run(on="ray")


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_the_commands_run_are_interrupted_go_on_and_tell_how_far_they_are(tmp_path, environment):
    path, out = written(tmp_path), tmp_path / "out"
    with subprocess.Popen(
        [*SPARING, "study", "run", str(path), "--out", str(out)], stderr=subprocess.PIPE, text=True
    ) as child:
        for _ in range(1200):
            if (out / "results.sqlite").exists() and _done(out):
                break
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        assert child.stderr is not None
        said = child.stderr.read()
    assert child.returncode == 130, said
    assert f"kept in {out}" in " ".join(said.split())
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    before = _done(out)
    assert 0 < before < 12
    shown = subprocess.run([*SPARING, "study", "status", str(out)], capture_output=True, text=True, check=True).stdout
    assert f"{before} done" in shown
    assert f"sparing study resume {out}" in " ".join(shown.split())
    resumed = subprocess.run([*SPARING, "study", "resume", str(out)], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert f"12 cells, {before} of them there" in resumed.stdout
    assert _done(out) == 12


def _done(out: Path) -> int:
    try:
        with Store(out / "results.sqlite", patience=30) as store:
            return list(store.statuses().values()).count("done")
    except ValueError as error:
        # The run has made the file and not yet its tables.
        if "no results yet" in str(error):
            return 0
        raise


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "does not exist"),
        (["run", "study.yaml", "--path", "data"], "give NAME=FOLDER"),
        (["run", "study.yaml", "--path", "data=/x"], "no path of"),
        (["resume", "."], "run the study first"),
        (["status", "nowhere"], "run the study first"),
    ],
)
def test_bad_arguments_end_with_a_line(tmp_path, monkeypatch, capsys, arguments, message):
    from sparing.cli import main

    written(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["study", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in " ".join(said.split())
    assert said.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["study.yaml"]
