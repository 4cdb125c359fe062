"""How checkpoints are written: whole or not at all, and nothing of anybody else's is lost."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

import sparing
from checkpoint_cases import files_of, save_skipping
from checkpoint_kills import kill_at_each_step, kill_while_saving
from models import llama
from sparing.checkpoint import replacing
from sparing.policies import SkipModules


def test_nothing_else_is_overwritten(tmp_path):
    """A file, a folder of other things: refused. What others put beside a checkpoint, their README too, stays."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        sparing.save(llama(), tmp_path / "file")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(ValueError, match="holds other things .chapter.tex."):
        sparing.save(llama(), tmp_path / "thesis")
    saved = tmp_path / "saved"
    save_skipping(saved)
    assert "SkipGPT" in (saved / "README.md").read_text()
    sparing.save(llama(), saved)
    assert "SkipGPT" not in (saved / "README.md").read_text()
    (saved / "README.md").write_text("mine")
    (saved / "notes").mkdir()
    (saved / "notes" / "a.txt").write_text("kept")
    (tmp_path / "link").symlink_to(saved)
    save_skipping(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (saved / "README.md").read_text() == "mine"
    assert "SkipGPT" in (saved / "README.sparing.md").read_text()
    assert (saved / "notes" / "a.txt").read_text() == "kept"
    assert not (saved / "model.safetensors").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["ctrl-c", "full"])
@pytest.mark.parametrize(("step", "nth"), [("rename", 0), ("rename", 1), ("fsync", 0), ("fsync", 3), ("link", 0)])
def test_an_interrupted_save_leaves_the_old_one(step, nth, error, tmp_path, monkeypatch):
    """Ctrl-C and a full disk at every kind of step: the old checkpoint is as it was, and nothing is left beside it."""
    saved = tmp_path / "saved"
    save_skipping(saved)
    (saved / "mine.txt").write_text("kept")
    before, real, count = files_of(saved), getattr(os, step), [0]

    def fails(*args, **kwargs):
        count[0] += 1
        if count[0] == nth + 1:
            raise error
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(replacing.os, step, fails)
        if step == "link" and isinstance(error, OSError):
            sparing.save(llama(), saved)  # a file system without links: copied
            assert (saved / "mine.txt").read_text() == "kept"
            return
        with pytest.raises(type(error)) as caught:
            sparing.save(llama(), saved)
    if isinstance(error, OSError):
        message = str(caught.value)
        assert message.startswith(f"could not save to {saved} (")
        assert "No space left" in message
        assert "as it was" in message
        assert "\n" not in message
    assert files_of(saved) == before
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="could not save to .*File exists"):
        sparing.save(llama(), tmp_path / "file" / "saved")


def test_a_save_killed_between_its_renames(tmp_path):
    """The old one, put aside, is found; the next save tidies up and keeps another process's work."""
    saved = tmp_path / "saved"
    save_skipping(saved)
    before = files_of(saved)
    (tmp_path / ".saved.sparing-new-1").mkdir()
    (tmp_path / ".saved.sparing-trash-1").mkdir()
    saved.rename(tmp_path / ".saved.sparing-old")
    assert sparing.run_of(sparing.load(saved)[0]) is not None
    with replacing.replaced(tmp_path / "saved", lambda name: True) as new:
        assert files_of(saved) == before
        save_skipping(tmp_path / "saved")
        assert new.exists()  # ours is not a leftover
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_a_full_disk(tmp_path):
    """A real failed write, by a limit on file sizes: one line, the old one whole, nothing beside it."""
    saved = tmp_path / "saved"
    save_skipping(saved)
    before = files_of(saved)
    code = (
        "import resource, signal, sys; sys.path[:0] = sys.argv[2:]\n"
        "import sparing, models\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try: sparing.save(models.llama(), sys.argv[1])\n"
        "except OSError as error: print(error)\n"
    )
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(saved), str(tests), str(tests.parent / "src")],
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip().count("\n") == 0, done.stdout + done.stderr
    assert "could not save" in done.stdout, done.stdout + done.stderr
    assert "as it was" in done.stdout
    assert files_of(saved) == before
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_saves(tmp_path):
    """SIGKILL at random moments: the old checkpoint or the new one loads, each time."""
    figures = kill_while_saving(tmp_path, kills=12, seed=0)
    assert figures["kills"] == 12
    assert figures["lost_on_kill"] == 0
    assert figures["interrupted_mid_save"] >= 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_around_each_rename(tmp_path):
    """SIGKILL right before and after each rename and removal, which random moments never hit."""
    figures = kill_at_each_step(tmp_path)
    assert figures["kills"] >= 8
    assert figures["lost_on_kill"] == 0
    assert figures["between_renames"] >= 1


def test_other_projects_are_no_checkpoints(tmp_path):
    """A folder whose `config.json` is somebody else's is refused; what only looks like a tokenizer's file stays."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "config.json").write_text('{"port": 80}')
    with pytest.raises(ValueError, match="holds other things .config.json."):
        sparing.save(llama(), tmp_path / "app")
    assert (tmp_path / "app" / "config.json").read_text() == '{"port": 80}'
    saved = sparing.save(llama(), tmp_path / "saved")
    (saved / "tokenizer_notes.py").write_text("mine")
    sparing.save(llama(), saved)
    assert (saved / "tokenizer_notes.py").read_text() == "mine"


def in_child(work):
    """Run `work` in a fork; returns its process id. Starting Python and torch anew would take seconds."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            work()
            os._exit(0)
        except KeyboardInterrupt:
            os._exit(130)
        except OSError as error:
            os._exit(3 if "could not save to" in str(error) and "as it was" in str(error) else 4)
        finally:
            os._exit(1)
    return child


def code_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_read_only_folder():
    """Nobody's process may not write there: one line, the old one whole. Root may always, so the child is not root."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own lie in one that nobody else may enter
        refuses_to_write(Path(folder))


def refuses_to_write(tmp_path):
    tmp_path.chmod(0o755)
    saved = tmp_path / "saved"
    save_skipping(saved)
    before = files_of(saved)

    def work():
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        else:
            tmp_path.chmod(0o555)
        sparing.save(llama(), saved)

    assert code_of(in_child(work)) == 3
    tmp_path.chmod(0o755)
    assert files_of(saved) == before
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def interrupted(child):
    """Press Ctrl-C, again where Python lost it in a destructor; the child's code, `None` if it would not stop."""
    for _ in range(4):
        os.kill(child, signal.SIGINT)
        # Long enough for a busy machine: a second one would interrupt the cleaning up after the first.
        for _ in range(250):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGINT")
@pytest.mark.parametrize("what", ["save", "load"])
def test_ctrl_c(what, tmp_path):
    """SIGINT at different moments of saves and loads: a KeyboardInterrupt, a whole checkpoint, and nothing beside it for longer
    than until the next save."""
    saved = tmp_path / "saved"
    save_skipping(saved)

    def work():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        while True:
            save_skipping(saved) if what == "save" else sparing.load(saved)

    for delay in (0.11, 0.17, 0.23):
        child = in_child(work)
        time.sleep(delay)
        assert interrupted(child) == 130
        assert sparing.run_of(sparing.load(saved)[0]) is not None
        beside = {p.name for p in tmp_path.iterdir()} - {"saved"}
        # Between two steps of a save any of its own folders may stay: not begun, put aside, or half deleted.
        assert all(name.startswith(".saved.sparing-") for name in beside)
        save_skipping(saved)
        assert [p.name for p in tmp_path.iterdir()] == ["saved"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_save_to_the_same_place(tmp_path):
    """Both succeed, the last one stays, whole, and nothing is left beside it; the path has spaces and more than ASCII."""
    saved = tmp_path / "my mödel"
    save_skipping(saved)

    def work():
        for _ in range(6):
            save_skipping(saved)

    children = [in_child(work) for _ in range(2)]
    assert [code_of(child) for child in children] == [0, 0]
    assert sparing.run_of(sparing.load(saved)[0]) is not None
    assert [p.name for p in tmp_path.iterdir()] == ["my mödel"]


def test_how_policies_were_found_is_kept_with_them(tiny_llama, tmp_path):
    from sparing.checkpoint import about

    target = tmp_path / "out"
    target.mkdir()
    (target / "run.json").write_text("{}")  # a command's own record is no stranger
    found = {"selection": {"layers": [1], "scores": {"kl": [0.1, 0.2, 0.0]}}}
    sparing.save(tiny_llama, target, [SkipModules(mlp=[1])], about=found)
    assert about(target) == found
    manifest = (target / "sparing.json").read_text()
    (target / "sparing.json").write_text(manifest.replace('"about": {', '"about": [], "before": {', 1))
    with pytest.raises(ValueError, match="`about` in the manifest is no object"):
        about(target)
    (target / "sparing.json").write_text(manifest)
    assert (target / "run.json").read_text() == "{}"
    sparing.save(tiny_llama, tmp_path / "bare", [SkipModules(mlp=[1])])
    assert about(tmp_path / "bare") == {}
    with pytest.raises(ValueError, match="about= says how policies were found, and there are none"):
        sparing.save(tiny_llama, tmp_path / "plain", about=found)
    sparing.save(tiny_llama, tmp_path / "plain")
    with pytest.raises(ValueError, match=r"is no checkpoint that sparing.save wrote with policies"):
        about(tmp_path / "plain")
