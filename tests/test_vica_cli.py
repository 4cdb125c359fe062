"""`sparing vica convert` and `train`: what they write and print, what they refuse, and that nothing comes up dense."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import picture_cases
import processors
import profile_cases
import sparing
from sparing.checkpoint import about
from sparing.cli import main
from sparing.policies import ViCA
from sparing.train import write_conversations

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "vica-llava-1.5-7b.yaml"


def checkpoint(folder, name):
    model, processor = processors.family(name)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("vision") / "model", "llava")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return picture_cases.folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The shipped model with layers by hand, on few questions."""
    out = tmp_path_factory.mktemp("converted") / "out"
    command = ["vica", "convert", "scenes-llava", "--layers", "0,5", "--prefix", "freeze", "--max-questions", "16"]
    assert main([*command, "--dtype", "float32", "--out", str(out)]) == 0
    return out


def words(*more):
    return [str(word) for word in more]


def test_a_conversion_chooses_layers_saves_them_with_their_scores_and_resumes(vision, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    command = words("vica", "convert", vision, "--images", pictures, "--budget", 2, "--by", "kl", "--out", out)
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "visual FLOPs" in printed
    assert "held-out loss" in printed
    assert "right answers" in printed
    model, processor = sparing.load(out)
    (policy,) = sparing.run_of(model).policy.parts()
    assert isinstance(policy, ViCA)
    assert len(policy.layers) == 2
    assert processor is not None
    kept = about(out)["selection"]
    assert tuple(kept["layers"]) == policy.layers
    assert set(kept["scores"]) == {"kl", "cosine"}
    assert [len(values) for values in kept["scores"].values()] == [3, 3]
    assert about(out)["loss"].keys() == {"dense", "ViCA"}
    assert "layers that read pictures" in (out / "README.md").read_text()
    run = json.loads((out / "run.json").read_text())
    assert run["status"] == "finished"
    assert run["figures"]["selection"] == kept
    assert [set(row) for row in run["figures"]["answers"]] == [{"question", "expected", "dense", "ViCA"}] * 8
    measured = (out / "measurements.jsonl").read_text()
    assert main(command) == 0
    assert (out / "measurements.jsonl").read_text() == measured, "nothing was measured again"
    assert about(out)["selection"] == kept


def test_stock_loading_of_a_converted_model_fails(converted):
    for cls in (transformers.AutoModelForImageTextToText, transformers.LlavaForConditionalGeneration):
        with pytest.raises((ValueError, AttributeError), match=r"load it with sparing.load"):
            cls.from_pretrained(converted)
    model, _ = sparing.load(converted)
    assert repr(sparing.run_of(model).policy) == "ViCA([0, 5], prefix='freeze')"


def test_given_layers_need_no_pictures(vision, tmp_path, capsys):
    assert main(words("vica", "convert", vision, "--layers", "0,2", "--prefix", 1, "--out", tmp_path / "o")) == 0
    assert "nothing to measure on" in capsys.readouterr().out
    assert sparing.run_of(sparing.load(tmp_path / "o")[0]).policy.parts()[0].prefix == 1
    assert about(tmp_path / "o")["selection"] is None


@pytest.mark.parametrize("layers", ["0,1", "2"])
def test_a_model_that_adds_features_between_layers_is_told_what_that_means(layers, tmp_path, capsys):
    source, out = checkpoint(tmp_path / "m", "qwen3_vl"), tmp_path / "o"
    assert main(words("vica", "convert", source, "--layers", layers, "--out", out)) == 0
    assert "after layers 0, 1" in " ".join(capsys.readouterr().out.split())
    assert "adds features" in about(out)["notes"][0]
    model, processor = sparing.load(out)
    inputs = processors.inputs("qwen3_vl")
    with torch.no_grad():
        fast = model(**inputs).logits
        policy = sparing.release(model)
        with sparing.apply(model, policy, execute="dense"):
            slow = model(**inputs).logits
    valid = inputs["attention_mask"].bool() & (inputs["mm_token_type_ids"] == 0)
    torch.testing.assert_close(fast[valid], slow[valid], rtol=1e-4, atol=1e-4)
    del processor


def broken(folder, vision):
    import shutil

    shutil.copytree(vision, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight") and "language" in name)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def empty(folder, text=""):
    folder.mkdir()
    (folder / "questions.jsonl").write_text(text)
    return folder


BAD = {
    "out of range": (lambda v, d: (v, "--layers", "0,3"), "layer 3 does not exist; this model has layers 0..2"),
    "of a larger model": (
        lambda v, d: (v, "--layers", "0,1,7,8,9,10,11,14"),
        "layer 7 does not exist; this model has layers 0..2",
    ),
    "empty": (lambda v, d: (v, "--layers", ""), "names no layer, so the model would be blind"),
    "twice": (lambda v, d: (v, "--layers", "0,1,0"), "a layer is named twice"),
    "no numbers": (lambda v, d: (v, "--layers", "first"), "give auto, or layers with commas between them"),
    "prefix that is not there": (
        lambda v, d: (v, "--layers", "0", "--prefix", "99"),
        "ViCA(prefix=...): layer 99 does not exist",
    ),
    "strange prefix": (lambda v, d: (v, "--layers", "0", "--prefix", "thaw"), 'choose "update", "freeze"'),
    "no budget": (lambda v, d: (v, "--budget", "0"), "so the model would be blind: give at least 1"),
    "strange budget": (lambda v, d: (v, "--budget", "some"), "neither a number of layers (4) nor a share"),
    "too many layers": (lambda v, d: (v, "--budget", "9"), "more than the model's 3: give fewer"),
    "too small a share": (lambda v, d: (v, "--budget", "0.1%"), "holds no layer, so the model would be blind"),
    "text only": (
        lambda v, d: (profile_cases.checkpoint(d / "text"), "--layers", "0"),
        "reads text alone: name a vision-language model",
    ),
    "no folder": (lambda v, d: (v, "--images", d / "none"), "does not exist: name a folder of pictures"),
    "no questions": (lambda v, d: (v, "--images", empty(d / "e")), "has no rows"),
    "few questions": (
        lambda v, d: (v, "--images", picture_cases.folder(d / "few", pictures=2)),
        "has 4 questions, and at least 16 are needed",
    ),
    "nan": (
        lambda v, d: (broken(d / "nan", v),),
        "the weights contain NaN or infinite values: model.language_model.layers.1.mlp.up_proj.weight",
    ),
    "no such model": (lambda v, d: ("/nowhere/model", "--layers", "0"), "no such path: /nowhere/model"),
    "a file": (lambda v, d: (v, "--out", v / "config.json" / "x"), "is a file; name a folder"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(what, vision, pictures, tmp_path, capsys):
    make, message = BAD[what]
    given = words("vica", "convert", *make(vision, tmp_path))
    given += [] if "--images" in given else ["--images", str(pictures)]
    given += [] if "--out" in given else ["--out", str(tmp_path / "out")]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "sparing.json").exists()


def test_auto_without_pictures_and_a_converted_model_are_refused(vision, converted, tmp_path, capsys):
    assert main(words("vica", "convert", vision, "--out", tmp_path / "o")) == 2
    assert "--layers auto needs pictures to choose on: give --images DIR" in capsys.readouterr().err
    assert main(words("vica", "convert", converted, "--out", tmp_path / "p")) == 2
    assert "follows ViCA([0, 5], prefix='freeze') already" in capsys.readouterr().err


def test_training_goes_on_from_a_conversion_and_says_how_fast_it_was(converted, tmp_path, capsys):
    rows, out = write_conversations(tmp_path / "data", 6, turns=2), tmp_path / "out"
    command = words("vica", "train", converted, "--data", rows, "--batch", 2, "--lr", 1e-3, "--max-questions", 16)
    command += words("--out", out, "--stages", "llava", "--steps", 2, "--dtype", "float32", "--seed", 3)
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "tokens/s in" in printed
    assert "held-out loss" in printed
    model, _ = sparing.load(out)
    assert repr(sparing.run_of(model).policy) == "ViCA([0, 5], prefix='freeze')"
    run = json.loads((out / "run.json").read_text())
    assert run["seed"] == 3
    assert [stage["name"] for stage in run["figures"]["training"]] == ["projector", "language"]
    assert all(stage["tokens_per_second"] > 0 for stage in run["figures"]["training"])
    assert [stage["how"]["lr"] for stage in about(out)["training"]] == [1e-3, 1e-3]
    assert about(out)["loss"].keys() == {"dense", "ViCA", "trained"}
    before = sparing.load(converted)[0].model.multi_modal_projector.linear_1.weight
    assert not torch.equal(before, model.model.multi_modal_projector.linear_1.weight)


@pytest.mark.parametrize("given", [["--recipe", str(RECIPE)], [str(RECIPE)]])
def test_the_recipe_runs_shrunk(given, tmp_path, capsys):
    assert main(["vica", "train", *given, "--shrink", "--max-questions", "16", "--out", str(tmp_path / "o")]) == 0
    assert "instructions: 2 steps" in capsys.readouterr().out
    model, _ = sparing.load(tmp_path / "o")
    assert repr(sparing.run_of(model).policy) == "ViCA([0, 1], prefix='freeze')"
    assert model.config.text_config.num_hidden_layers == 2
    lines = (tmp_path / "o" / "training" / "data" / "rows.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert {"image", "conversations"} <= set(json.loads(lines[0]))


def train_words(vision, d, *more):
    return (vision, "--layers", "0", *more)


BAD_TRAINING = {
    "neither": (lambda v, d: (), "give a MODEL, or a recipe"),
    "both": (lambda v, d: (v, "--recipe", RECIPE), "give a MODEL, or a recipe"),
    "shrink": (lambda v, d: (v, "--shrink"), "--shrink is for recipes"),
    "no data": (lambda v, d: train_words(v, d), "nothing to train on: give --data FILE"),
    "missing data": (lambda v, d: train_words(v, d, "--data", d / "none.jsonl"), "does not exist: name a file of JSON"),
    "layers": (
        lambda v, d: (v, "--layers", "5", "--data", write_conversations(d / "data", 2)),
        "layer 5 does not exist; this model has layers 0..2",
    ),
    "no rate": (lambda v, d: train_words(v, d, "--lr", 0), "lr=0: expected a finite number above 0"),
    "uneven": (lambda v, d: train_words(v, d, "--batch", 4, "--at-once", 3), "no multiple of the 3 at once"),
    "its own folder": (lambda v, d: train_words(v, d, "--out", v), "is the model's own folder, whose weights would be"),
    "recipe": (lambda v, d: ("--recipe", d / "none.yaml"), "cannot be read"),
    "path": (lambda v, d: ("--recipe", RECIPE, "--shrink", "--path", "data"), "give NAME=FOLDER"),
    "text": (
        lambda v, d: (profile_cases.checkpoint(d / "text"), "--layers", "0"),
        "reads text alone: name a vision-language model",
    ),
}


@pytest.mark.parametrize("what", BAD_TRAINING)
def test_bad_trainings_are_one_line(what, vision, tmp_path, capsys):
    make, message = BAD_TRAINING[what]
    given = words("vica", "train", *make(vision, tmp_path))
    assert main(given + ([] if "--out" in given else ["--out", str(tmp_path / "out")])) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--data", "/none.jsonl"), "does not exist: name a file of JSON"),
        (("--epochs", "inf"), "epochs=inf: expected a finite number above 0"),
        (("--stages", "llava", "--projector-lr", "0"), "lr=0: expected a finite number above 0"),
        (("--batch", "6", "--at-once", "4"), "no multiple of the 4 at once"),
    ],
)
def test_data_and_settings_are_looked_at_before_anything_is_loaded(tmp_path, capsys, given, message):
    assert main(words("vica", "train", "/nowhere/model", *given, "--out", tmp_path / "o")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("command", ["convert", "train"])
def test_a_folder_of_other_things_is_refused_before_anything_is_loaded(tmp_path, capsys, command):
    assert main(words("vica", command, "/nowhere/model", "--layers", 0, "--out", empty(tmp_path / "e"))) == 2
    assert "holds other things (questions.jsonl) and no checkpoint: name a new folder" in capsys.readouterr().err


def test_layers_of_a_converted_model_stand(converted, tmp_path, capsys):
    assert main(words("vica", "train", converted, "--layers", "1", "--steps", 1, "--out", tmp_path / "o")) == 2
    assert "reads in layers [0, 5] already: leave --layers out" in capsys.readouterr().err


# In processes of their own --------------------------------------------------------------------------------------------


def start(*command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train_command(converted, out, *more):
    return ("vica", "train", converted, "--batch", 4, "--lr", 1e-3, "--max-questions", 16, "--out", out, *more)


@pytest.mark.slow
def test_ctrl_c_ends_with_a_checkpoint_and_its_exit_code(converted, tmp_path):
    out = tmp_path / "out"
    command = train_command(converted, out, "--steps", 400)
    process = start("sparing.cli", *command)
    log = out / "training" / "tune" / "log.jsonl"
    deadline = time.monotonic() + 200
    while not (log.exists() and log.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 130, error
    assert "interrupted; what was finished is kept in" in error
    (kept,) = (out / "training" / "tune").glob("checkpoint-*")
    assert (kept / "trainer_state.json").exists()
    assert not (out / "sparing.json").exists()
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
def test_two_processes_train_what_one_trains(converted, tmp_path):
    """Two processes with gloo, each with half of the batch, come to the weights of one with all of it."""
    # `accelerate launch --cpu --num_processes 2` starts one process.
    two = start(
        "torch.distributed.run",
        "--nproc_per_node",
        2,
        "-m",
        "sparing.cli",
        *train_command(converted, tmp_path / "two", "--steps", 2),
    )
    printed, error = two.communicate(timeout=280)
    assert two.returncode == 0, error[-3000:]
    assert printed.count("saved:") == 1, "one of them speaks"
    assert "2 processes share each step" in printed
    assert main(words(*train_command(converted, tmp_path / "one", "--steps", 2))) == 0
    runs = [json.loads((tmp_path / name / "run.json").read_text())["figures"] for name in ("one", "two")]
    assert runs[0]["training"][0]["tokens"] == runs[1]["training"][0]["tokens"]
    weights = [load_file(tmp_path / name / "sparing.safetensors") for name in ("one", "two")]
    start_weights = load_file(converted / "sparing.safetensors")
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-3, atol=5e-5)
    moved = max(float((weight - start_weights[name]).abs().max()) for name, weight in weights[0].items())
    assert moved > 5e-4
