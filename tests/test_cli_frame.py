"""The command line's frame: a cheap help, one line and one code an error, a record never half written."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from sparing.cli import errors, record
from sparing.evaluate import environment

HEAVY = ("torch", "transformers", "datasets", "numpy", "matplotlib")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("words", [["--help"], [], ["--version"], ["zoo", "--help"]])
def test_help_imports_nothing_heavy_and_is_quick(words):
    # CPU time, the best of three: other tests share these cores.
    code = (
        "import sys, time; from sparing.cli import main\n"
        f"code = main({words!r})\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])\n"
        "print('CODE', code); print('CPU', time.process_time())"
    )
    runs = [python(code) for _ in range(3)]
    assert all("HEAVY []" in run.stdout and "CODE 0" in run.stdout for run in runs), runs[0]
    assert min(float(run.stdout.rpartition("CPU")[2]) for run in runs) < 0.5


def test_the_error_of_an_unknown_option_is_one_line_with_the_command_that_explains():
    run = python("import sys; from sparing.cli import main; sys.exit(main(['zoo', '--colour']))")
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.count("\n") == 1
    assert "--colour" in run.stderr
    assert "sparing zoo --help" in run.stderr


def failing(error: BaseException) -> typer.Typer:
    app = typer.Typer()

    @app.callback()
    def options(debug: bool = typer.Option(False, "--debug")) -> None:
        pass

    @app.command()
    def go() -> None:
        raise error

    return app


class SafetensorError(Exception):
    """Stands for the one of safetensors, which has no more base classes than this one."""


class OutOfMemoryError(RuntimeError):
    """Stands for the one of torch."""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("got 3 layers:\n  pass 4"), 2, "error: got 3 layers: pass 4"),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "a[b].json"),
            2,
            "error: No such file: a[b].json",
        ),
        (
            NotADirectoryError("--out x is a file: name a folder"),
            2,
            "error: --out x is a file: name a folder",
        ),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "runs"), 2, "error: Is a directory: runs"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "error: Permission denied: /x"),
        (
            OSError(errno.ENOSPC, "No space left on device", "w.bin"),
            2,
            "error: no space left on the disk while writing w.bin: free space, or choose another --out",
        ),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            2,
            "error: no space left on the disk: free space, or choose another --out",
        ),
        (SafetensorError("header too large"), 2, "error: header too large"),
        (
            OutOfMemoryError("tried 2 GiB"),
            2,
            "error: out of memory: use a smaller batch, or a smaller --dtype (tried 2 GiB)",
        ),
        (
            ModuleNotFoundError("No module named 'peft'", name="peft"),
            2,
            "error: peft is not installed: pip install 'sparing[train]'",
        ),
        (
            typer.BadParameter("ratio is above 1"),
            2,
            "error: Invalid value: ratio is above 1 (see `sparing go --help`)",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            errors.Interrupted(Path("runs/a")),
            130,
            "interrupted; what was finished is kept in runs/a",
        ),
        (typer.Abort(), 130, "interrupted"),
        (
            KeyError("layer"),
            70,
            "internal error: KeyError: 'layer' (rerun with --debug and report it)",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_is_one_line_and_a_code(error, code, line, capsys):
    assert errors.run(failing(error), ["go"], debug=False) == code
    printed = capsys.readouterr()
    assert printed.err == line + "\n"
    assert printed.out == ""


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (3, 3)])
def test_an_exit_keeps_its_code_and_says_nothing(code, expected, capsys):
    assert errors.run(failing(typer.Exit(code)), ["go"], debug=False) == expected
    assert capsys.readouterr().err == ""


def test_debug_shows_the_traceback_and_keeps_the_code(capsys):
    assert errors.run(failing(ValueError("no")), ["--debug", "go"], debug=True) == 2
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert "raise error" in printed
    assert printed.endswith("error: no\n")


@pytest.mark.parametrize("words", [["--debug", "zoo", "--colour"], ["zoo", "--colour", "--debug"]])
def test_debug_may_stand_anywhere(words):
    run = python(f"import sys; from sparing.cli import main; sys.exit(main({words!r}))")
    assert run.returncode == 2
    assert "Traceback" in run.stderr


def test_a_record_says_what_ran_on_what(tmp_path):
    import torch

    out = tmp_path / "new" / "run"
    config = {"ratio": 0.5, "path": tmp_path, "dtype": torch.float16}
    with record.RunRecord(out, config=config, seed=7) as run:
        assert json.loads((out / "run.json").read_text())["status"] == "running"
        run.figures.update(loss=torch.tensor(1.5), worst=float("inf"), rows=torch.arange(3))
    written = json.loads((out / "run.json").read_text())
    assert written["status"] == "finished"
    assert written["seed"] == 7
    assert written["config"] == {"ratio": 0.5, "path": str(tmp_path), "dtype": "torch.float16"}
    assert written["figures"] == {"loss": 1.5, "worst": "inf", "rows": [0, 1, 2]}
    assert written["versions"]["torch"] == torch.__version__
    assert written["hardware"]["cores"] >= 1
    assert written["seconds"] >= 0
    assert written["earlier"] == []


def test_a_resumed_run_remembers_the_earlier_ones(tmp_path):
    for seed in range(3):
        with record.RunRecord(tmp_path, config={}, seed=seed):
            pass
    written = json.loads((tmp_path / "run.json").read_text())
    assert [run["seed"] for run in written["earlier"]] == [0, 1]
    assert written["seed"] == 2


def test_a_failed_run_says_so_and_the_error_goes_on(tmp_path):
    with pytest.raises(ValueError, match="no"), record.RunRecord(tmp_path, config={}):
        raise ValueError("no")
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"


def test_a_record_refuses_a_file_and_a_foreign_run_json(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(NotADirectoryError, match="name a folder"),
        record.RunRecord(tmp_path / "file", config={}),
    ):
        pass
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(ValueError, match="move it away"), record.RunRecord(tmp_path, config={}):
        pass
    assert (tmp_path / "run.json").read_text() == "[]"


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch, broken):
    path = tmp_path / "run.json"
    record.write_json(path, {"old": 1})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(OSError, match="No space"):
        record.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_does_not_hide_the_error_of_the_run(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    cause = ValueError("the cause")
    with pytest.raises(ValueError, match="the cause"), record.RunRecord(tmp_path, config={}) as run:
        monkeypatch.setattr(run, "write", full)
        raise cause
    assert "could not be written" in cause.__notes__[0]


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_keeps_what_was_finished(tmp_path):
    out = tmp_path / "run"
    code = f"""
import sys, time, typer
from pathlib import Path
from sparing.cli import errors
from sparing.cli.record import RunRecord
app = typer.Typer()
@app.command()
def go():
    with RunRecord(Path({str(out)!r}), config={{}}) as run:
        run.figures["done"] = 3
        run.write()
        time.sleep(60)
sys.exit(errors.run(app, [], debug=False))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if (out / "run.json").exists() and json.loads((out / "run.json").read_text())["figures"]:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=30)
    assert process.returncode == 130
    assert " ".join(printed.split()) == f"interrupted; what was finished is kept in {out}"
    written = json.loads((out / "run.json").read_text())
    assert written["status"] == "interrupted"
    assert written["figures"] == {"done": 3}


def test_git_state_is_that_of_the_checkout_only(tmp_path):
    assert environment.git_state(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert environment.git_state(tmp_path) is None
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    state = environment.git_state(tmp_path)
    assert state is not None
    assert len(state["sha"]) == 40
    assert not state["dirty"]
    (tmp_path / "new.py").touch()
    assert environment.git_state(tmp_path) == {**state, "dirty": True}
    (tmp_path / "inside").mkdir()
    assert environment.git_state(tmp_path / "inside") is None


def test_options_name_devices_and_dtypes():
    import torch

    from sparing.cli.options import device_of, dtype_of

    assert device_of("cpu") == torch.device("cpu")
    for wrong in ("cuda:99", "tpu9000"):
        with pytest.raises(ValueError, match="use auto or one of cpu"):
            device_of(wrong)
    assert dtype_of("bfloat16") is torch.bfloat16
    assert dtype_of("auto") == "auto"


def test_versions_of_a_checkout_that_is_not_installed(monkeypatch):
    from importlib import metadata

    known = metadata.version

    def version(name):
        if name == "sparing":
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "version", version)
    found = environment.versions()
    assert found["sparing"] == "not installed"
    assert found["torch"] == known("torch")
