"""`sparing profile` and `sparing demo`: what they write, what they refuse, and that nothing is left half written."""

import dataclasses
import gzip
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import picture_cases
import processors
import profile_cases as cases
from sparing import zoo
from sparing.cli import main
from sparing.evaluate import Settings, read_questions
from sparing.evaluate.windows import READ_LIMIT, read_text
from sparing.study import render


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return cases.checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "page.txt"
    path.write_text(cases.text(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    model, processor = processors.family("llava")
    folder = tmp_path_factory.mktemp("vision") / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def short_timing(monkeypatch):
    """Timing is the slow part of a tiny model's profile."""
    quick = Settings.quick
    monkeypatch.setattr(Settings, "quick", lambda self: dataclasses.replace(quick(self), repeats=1, steps=2))


def words(*more):
    return [str(word) for word in more]


def test_a_quick_run_writes_a_record_and_a_report_and_resumes(checkpoint, text, tmp_path, capsys, short_timing):
    command = words("profile", checkpoint, "--text", text, "--quick", "--out", tmp_path, "--window", 24, "--seed", 5)
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "The plan " in printed
    assert "report.html" in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["measurements.jsonl", "report.html", "run.json"]
    run = json.loads((tmp_path / "run.json").read_text())
    figures = run["figures"]
    assert (run["status"], run["seed"], run["config"]["quick"], run["config"]["budget"]) == ("finished", 5, True, 0.6)
    assert figures["planned"]["flops_ratio"] <= 0.6
    assert figures["measured"] == len((tmp_path / "measurements.jsonl").read_text().splitlines())
    assert figures["text"]["file"] == str(text)
    assert [t["batch"] for t in figures["timings"]] == [1, 8]
    # The record alone is enough for the report.
    assert "sparing profile" in render(figures, run)
    assert main(command) == 0
    again = json.loads((tmp_path / "run.json").read_text())
    assert again["figures"]["measured"] == 0
    assert again["figures"]["planned"] == figures["planned"]
    assert len(again["earlier"]) == 1


def test_pictures_are_profiled_with_their_questions(vision, tmp_path, capsys, short_timing):
    folder, out = picture_cases.folder(tmp_path / "pictures"), tmp_path / "out"
    command = words("profile", vision, "--images", folder, "--quick", "--out", out, "--seed", 5, "--dtype", "float32")
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "right answers" in printed
    assert "image read" in printed
    assert sorted(p.name for p in out.iterdir()) == ["measurements.jsonl", "report.html", "run.json"]
    run = json.loads((out / "run.json").read_text())
    assert run["config"]["images"] == run["figures"]["pictures"]["file"] == str(folder)
    assert run["figures"]["planned"]["flops_ratio"] <= 0.6
    assert '<img src="data:image/' in (out / "report.html").read_text()
    assert main(command) == 0
    assert json.loads((out / "run.json").read_text())["figures"]["measured"] == 0


def test_gzipped_text_is_the_same_text(text, tmp_path):
    packed = tmp_path / "page.gz"
    packed.write_bytes(gzip.compress(text.read_bytes()))
    assert read_text(packed) == read_text(text)


def test_only_the_beginning_of_a_huge_text_is_read(tmp_path):
    path = tmp_path / "huge.txt"
    # Two bytes a character after a single one: the limit falls into the middle of one.
    path.write_text("a" + "é" * (READ_LIMIT // 2 + 10), encoding="utf-8")
    assert read_text(path) == "a" + "é" * (READ_LIMIT // 2 - 1)


def damaged(checkpoint, folder, how):
    shutil.copytree(checkpoint, folder)
    weights = folder / "model.safetensors"
    if how == "corrupt":
        weights.write_bytes(weights.read_bytes()[:4000])
    elif how == "nan":
        tensors = load_file(weights)
        tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = torch.nan
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": how}))
    return folder


def write(path, content):
    path.write_bytes(content)
    return path


BAD = {
    "no such model": (lambda c, d: ("/nowhere/model",), "no such path: /nowhere/model"),
    "no config": (lambda c, d: (damaged(c, d / "m", "no config"),), "no config.json"),
    "encoder only": (
        lambda c, d: (damaged(c, d / "m", "bert"),),
        "unknown model family 'bert'; known families: gemma2",
    ),
    "no tokenizer": (lambda c, d: (damaged(c, d / "m", "no tokenizer"),), "no tokenizer: save it there"),
    "corrupt": (lambda c, d: (damaged(c, d / "m", "corrupt"),), "weights are corrupt"),
    "nan": (
        lambda c, d: (damaged(c, d / "m", "nan"),),
        "weights contain NaN or infinite values: model.layers.2.mlp.down_proj",
    ),
    "no text": (lambda c, d: (c, "--text", d / "none.txt"), "does not exist: name a UTF-8 text file"),
    "folder": (lambda c, d: (c, "--text", d), "is a folder: name a UTF-8 text file"),
    "empty": (lambda c, d: (c, "--text", write(d / "e.txt", b" \n")), "is empty: give a text with at least 128 tokens"),
    "short": (lambda c, d: (c, "--text", write(d / "s.txt", b" cat")), "too short: it has 1 tokens"),
    "latin": (
        lambda c, d: (c, "--text", write(d / "l.txt", b"caf\xe9 " * 99)),
        "not UTF-8 (byte 3 is 0xe9): convert it",
    ),
    "half a gzip": (
        lambda c, d: (c, "--text", write(d / "g.gz", gzip.compress(b"abc" * 99)[:20])),
        "not a whole gzip file",
    ),
    "no gzip": (lambda c, d: (c, "--text", write(d / "g.gz", b"plain")), "not a whole gzip file"),
    "budget 0": (lambda c, d: (c, "--budget", 0), "give a number above 0 and up to 1"),
    "budget 2": (lambda c, d: (c, "--budget", 2), "give a number above 0 and up to 1"),
    "budget too low": (
        lambda c, d: (c, "--budget", 0.01),
        "cannot be reached: the output matrix (lm_head) alone takes",
    ),
    "out is in a file": (lambda c, d: (c, "--out", write(d / "f", b"") / "x"), "is a file; name a folder"),
    "unknown device": (lambda c, d: (c, "--device", "tpu9"), "--device tpu9 is not available here"),
}


BAD_PICTURES = {
    "no folder": (lambda c, d: (d / "none",), "none does not exist: name a folder of pictures with a questions.jsonl"),
    "a file": (lambda c, d: (write(d / "f.png", b""),), "f.png is a file: name a folder of pictures"),
    "no questions": (lambda c, d: (d,), 'has no questions.jsonl: write one, a row for each question, as {"image"'),
    "no json": (lambda c, d: (write(d / "questions.jsonl", b'{"image": ').parent,), "questions.jsonl, line 1: no JSON"),
    "empty": (lambda c, d: (write(d / "questions.jsonl", b"\n").parent,), "questions.jsonl has no rows"),
    "few": (
        lambda c, d: (picture_cases.folder(d / "p", pictures=3),),
        "questions.jsonl has 6 questions, and at least 16 are needed: half of them choose a plan",
    ),
    "few used": (
        lambda c, d: (picture_cases.folder(d / "p"), "--max-questions", 8),
        "questions.jsonl has 8 questions, and at least 16 are needed",
    ),
    "text-only model": (
        lambda c, d: (picture_cases.folder(d / "p"),),
        "this model sees no pictures (its family, llama, reads text): profile it with --text FILE",
    ),
    "and a text": (lambda c, d: (d, "--text", d / "a.txt"), "--text and --images are two profiles: give one of them"),
}


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_bad_pictures_are_one_line(case, checkpoint, tmp_path, capsys):
    build, message = BAD_PICTURES[case]
    given = build(checkpoint, tmp_path)
    assert main(words("profile", checkpoint, "--out", tmp_path / "out", "--images", *given)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_earlier_results_whole(case, checkpoint, text, tmp_path, capsys):
    build, message = BAD[case]
    out = tmp_path / "out"
    out.mkdir()
    earlier = {name: write(out / name, name.encode()) for name in ("run.json", "report.html")}
    given = build(checkpoint, tmp_path)
    command = words("profile", *given)
    for option, value in (("--text", text), ("--out", out)):
        if option not in command:
            command += words(option, value)
    assert main(command) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert sorted(p.name for p in out.iterdir()) == sorted(earlier)
    assert all(path.read_text() == name for name, path in earlier.items())


def test_without_a_text_or_pictures_both_are_named():
    run = subprocess.run(
        [sys.executable, "-c", "import sys; from sparing.cli import main; sys.exit(main(['profile', 'x']))"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 2
    assert "--text FILE" in run.stderr
    assert "--images DIR" in run.stderr
    assert run.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_profiles_the_models_of_the_zoo(tmp_path, capsys, short_timing):
    try:
        zoo.path("arithmetic-llama"), zoo.path("scenes-llava")
    except ValueError as missing:
        pytest.skip(str(missing))
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    assert "report.html" in capsys.readouterr().out
    for folder, budget, other in (
        (tmp_path, 0.6, "pictures/report.html"),
        (tmp_path / "pictures", 0.3, "../report.html"),
    ):
        figures = json.loads((folder / "run.json").read_text())["figures"]
        assert figures["planned"]["flops_ratio"] <= budget
        # Choosing must beat chance by far on a model that was trained.
        assert figures["planned"]["added"][0] < min(point["added"][0] for point in figures["controls"])
        assert f'href="{other}"' in (folder / "report.html").read_text()
    # What the report was asked of can be asked again.
    assert len(read_questions(tmp_path / "scenes")) == len(list((tmp_path / "scenes").glob("*.png"))) == 22
