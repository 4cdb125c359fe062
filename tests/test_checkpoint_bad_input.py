"""Bad checkpoints, each given to the library and to the CLI: one line that says what to do, and nothing is left behind."""

import json
import os
import shlex
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import profile_cases as cases
import sparing
from checkpoint_cases import edit
from models import llava
from sparing.cli import main
from sparing.evaluate.checkup import checkup, running
from sparing.policies import SkipGPT, SkipModules, ViCA


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """An ordinary checkpoint, a sharded one, one with policies, and that one sharded."""
    root, model = tmp_path_factory.mktemp("originals"), cases.model()
    torch.manual_seed(0)
    policies = [SkipGPT.for_model(model), SkipModules(mlp=[1])]
    tools = {"processor": cases.tokenizer()}
    sparing.save(model, root / "plain", [], **tools)
    sparing.save(model, root / "shards", [], max_shard_size=20_000, **tools)
    sparing.save(model, root / "routed", policies, **tools)
    sparing.save(model, root / "routed-shards", policies, max_shard_size=20_000, **tools)
    return root


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    """Timing is the slow part of a check-up, and is looked at elsewhere."""
    real = running.check_costs
    monkeypatch.setattr(running, "check_costs", lambda probe, subject, **_: real(probe, subject, seconds=0.0, steps=2))


def manifest(change):
    return lambda folder: edit(folder / "sparing.json", change)


def config(**values):
    return lambda folder: edit(folder / "config.json", lambda c: c.update(values))


def tensors(name, change):
    def run(folder):
        found = load_file(folder / name)
        change(found)
        save_file(found, folder / name, {"format": "pt"})

    return run


def cut(name):
    def run(folder):
        path = sorted(folder.glob(name))[0]
        path.write_bytes(path.read_bytes()[:-100])

    return run


def drop(name):
    return lambda folder: sorted(folder.glob(name))[0].unlink()


def arguments(**values):
    return manifest(lambda m: m["policies"][0]["arguments"].update(values))


def wider(found):
    for name, tensor in list(found.items()):
        if "mlp" in name:
            found[name] = torch.cat([tensor, tensor], dim=-1).contiguous()


MODEL = "model.safetensors"
CASES = {
    "newer-schema": (
        "routed",
        manifest(lambda m: m.update(schema=7, sparing="9.9")),
        ["of sparing 9.9", "update sparing"],
    ),
    "older-schema": (
        "routed",
        manifest(lambda m: m.update(schema=0, sparing="0.0.1")),
        ["of sparing 0.0.1", "that version"],
    ),
    "no-schema": ("routed", manifest(lambda m: m.pop("schema")), ["save the checkpoint again"]),
    "no-policies": ("routed", manifest(lambda m: m.pop("policies")), ["list of policies", "save the checkpoint again"]),
    "no-weights-name": ("routed", manifest(lambda m: m.pop("weights")), ["save the checkpoint again"]),
    "manifest-cut-short": (
        "routed",
        lambda f: os.truncate(f / "sparing.json", 100),
        ["no manifest", "save the checkpoint again"],
    ),
    "manifest-is-a-list": ("routed", lambda f: (f / "sparing.json").write_text("[]"), ["save the checkpoint again"]),
    "unknown-policy": ("routed", manifest(lambda m: m["policies"][0].update({"class": "New"})), ["'New'", "SkipGPT"]),
    "unknown-argument": ("routed", arguments(k=3), ["SkipGPT cannot be made", "'k'"]),
    "bad-argument": ("routed", arguments(router="other"), ["router='other'", "linear"]),
    "other-depth": (
        "routed",
        manifest(lambda m: m["base_config"].update(num_hidden_layers=6)),
        ["missing model.layers.3", "fit the config"],
    ),
    "policy-of-other-depth": ("routed", arguments(depth=4), ["missing tensor 'attend.3"]),
    "policy-names-no-layer": (
        "routed",
        manifest(lambda m: m["policies"][1]["arguments"].update(mlp=[5])),
        ["layer 5 does not exist", "0..2"],
    ),
    "policy-of-other-width": ("routed", arguments(hidden=64), ["shape (2, 28), expected (2, 64)"]),
    "weights-of-other-width": ("plain", tensors(MODEL, wider), ["fit the config"]),
    "missing-tensor": ("plain", tensors(MODEL, lambda t: t.pop("lm_head.weight")), ["missing lm_head.weight"]),
    "extra-tensor": ("plain", tensors(MODEL, lambda t: t.update(x=torch.ones(2))), ["unexpected x"]),
    "missing-router": (
        "routed",
        tensors("policies.safetensors", lambda t: t.pop("0.feed.1.weight")),
        ["missing tensor 'feed.1.weight'"],
    ),
    "extra-router": ("routed", tensors("policies.safetensors", lambda t: t.update(x=torch.ones(2))), ["unexpected"]),
    "truncated": ("plain", cut(MODEL), ["corrupt"]),
    "truncated-shard": ("shards", cut("model-00002*"), ["corrupt"]),
    "truncated-shard-of-ours": ("routed-shards", cut("model-00002*"), ["corrupt"]),
    "truncated-routers": ("routed", cut("policies.safetensors"), ["corrupt"]),
    "missing-shard": ("shards", drop("model-00002*"), ["model-00002", "is not there", "again"]),
    "missing-shard-of-ours": ("routed-shards", drop("model-00002*"), ["model-00002", "save it again"]),
    "index-is-a-list": (
        "shards",
        lambda f: (f / "model.safetensors.index.json").write_text("[]"),
        ["no index of weights"],
    ),
    "config-is-a-list": ("plain", lambda f: (f / "config.json").write_text("[]"), ["config.json"]),
    "config-is-binary": ("plain", lambda f: (f / "config.json").write_bytes(b"\xff\x00"), ["not valid JSON"]),
    "unknown-type": ("plain", config(model_type="made-up"), ["made-up", "known families", "llama"]),
    "nonsense-sizes": ("plain", config(hidden_size="many"), ["hidden_size", "expected int"]),
    "nonsense-sizes-of-ours": (
        "routed",
        manifest(lambda m: m["base_config"].update(hidden_size="many")),
        ["hidden_size", "expected int"],
    ),
    "not-a-model": ("plain", lambda f: [shutil.rmtree(f), f.mkdir()], ["no config.json"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_checkpoints(case, originals, tmp_path, capsys):
    """`sparing.load` and `sparing check`; a folder whose name has spaces and more than ASCII."""
    source, break_it, words = CASES[case]
    folder = tmp_path / "my mödel"
    shutil.copytree(originals / source, folder)
    break_it(folder)
    with pytest.raises(ValueError) as caught:
        sparing.load(folder)
    assert main(["check", str(folder), "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    for message in (str(caught.value), printed.err.rstrip("\n")):
        assert "\n" not in message
        assert all(word in message for word in words), message
    assert "Traceback" not in printed.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["my mödel"]


def test_a_profile_of_a_bad_checkpoint_leaves_earlier_results(originals, tmp_path, capsys):
    """The same line from the other command, the traceback on demand, and the folder of results untouched."""
    shutil.copytree(originals / "plain", tmp_path / "model")
    cut(MODEL)(tmp_path / "model")
    (tmp_path / "text.txt").write_text(cases.text())
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("of yesterday")
    command = ["profile", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--out", str(out)]
    assert main(command) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main([*command, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert [(p.name, p.read_text()) for p in out.iterdir()] == [("report.html", "of yesterday")]


def test_policy_checkpoints_in_the_commands(originals, tmp_path, capsys):
    """`check` checks the policies that are in it; `profile` says that it would measure another model."""
    folder, out = str(originals / "routed"), tmp_path / "out"
    assert main(["check", folder, "--quick", "--out", str(out)]) == 0, capsys.readouterr()
    run = json.loads((out / "run.json").read_text())
    found = {(f["subject"], f["name"]): f["verdict"] for f in run["figures"]["findings"]}
    for name in ("dense = gathered", "generate()", "cached decoding", "saved"):
        assert found["as saved", name] == "ok"
    assert [words.partition("(")[0] for words in run["config"]["policies"]] == ["SkipGPT", "SkipModules"]
    (tmp_path / "text.txt").write_text(cases.text())
    capsys.readouterr()
    command = ["profile", folder, "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "other")]
    assert main(command) == 2
    line = capsys.readouterr().err
    assert "follows SkipGPT & SkipModules" in line
    assert "--without-policies" in line
    assert "sparing.release" in line
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (9, "layer 9 does not exist"),
        (-1, "layer -1 does not exist"),
        (0.5, "as whole numbers, got 0.5; save the checkpoint again"),
        ("a", "as whole numbers, got 'a'; save the checkpoint again"),
    ],
)
def test_layers_that_the_model_lacks_are_refused(tmp_path, layer, message):
    """Of more layers than the weights have, or no numbers of layers at all: the model would run, and be blind."""
    sparing.save(llava(), tmp_path / "saved", [ViCA([3])])
    edit(tmp_path / "saved" / "sparing.json", lambda m: m["policies"][0]["arguments"].update(layers=[0, layer]))
    with pytest.raises(ValueError, match=message):
        sparing.load(tmp_path / "saved")


def test_weights_that_are_not_numbers_load_and_are_found_by_check(originals, tmp_path):
    """Reading every weight at every load would be slow: `sparing check` does, and says which."""
    shutil.copytree(originals / "plain", tmp_path / "model")
    tensors(MODEL, lambda t: t["lm_head.weight"].fill_(float("nan")))(tmp_path / "model")
    found = checkup(*sparing.load(tmp_path / "model"), quick=True, policies=["SkipModules"])
    assert not found.safe
    assert "NaN" in found.findings[0].sentence
    assert "lm_head.weight" in found.findings[0].sentence


def pickled(folder, name, shards):
    """What older checkpoints look like."""
    weights = load_file(folder / MODEL)
    (folder / MODEL).unlink()
    if not shards:
        torch.save(weights, folder / name)
        return
    index = {}
    for i, part in enumerate((list(weights)[::2], list(weights)[1::2]), 1):
        file = f"{name}-0000{i}-of-00002.bin"
        torch.save({key: weights[key] for key in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / f"{name}.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.parametrize(
    ("name", "shards"),
    [("pytorch_model.bin", False), ("pytorch_model", True), ("consolidated.00.pth", False), ("weights.pt", False)],
)
def test_pickles_are_refused_with_a_command_that_converts_them(name, shards, originals, tmp_path, capsys):
    """What the message says to do does it: the same weights, and the tokenizer too."""
    folder = tmp_path / "it's a mödel"
    shutil.copytree(originals / "plain", folder)
    pickled(folder, name, shards)
    assert main(["check", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ValueError, match="pickled weights only .*which are never loaded") as caught:
        sparing.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    program, flag, code = shlex.split(message.partition("convert them with: ")[2])
    assert (program, flag) == ("python", "-c")
    exec(code, {})
    model, tokenizer = sparing.load(folder)
    assert tokenizer is not None
    for key, tensor in cases.model().state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor)
