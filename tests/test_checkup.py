"""`sparing check`: what is right passes, what is broken is found, and the page and the exit code say so."""

import dataclasses
import json
import types

import pytest
import torch
from markupsafe import escape
from safetensors.torch import load_file, save_file

import models
import profile_cases as cases
from sparing.cli import main
from sparing.evaluate.checkup import MEANINGS, NAMES, Subject, checkup, running
from sparing.evaluate.checkup import timing as timing_of
from sparing.evaluate.checkup.subjects import subjects_for
from sparing.plan import LayerPlan, Policy
from sparing.policies import DropTokens, SkipModules
from sparing.study.pages.check_page import render_check
from sparing.tokens import Group

RIVALS = ["SparseVLM", "DART", "DivPrune", "CDPruner", "VisionZip", "VisPruner", "VScan"]
VISION = ["EnterLate", "ViCA", "FastV", "PyramidDrop", *RIVALS]


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    """Timing is the slow part on tiny models, and what it finds is the machine's."""
    monkeypatch.setattr(timing_of, "SLOW", 0.0)
    monkeypatch.setattr(timing_of, "BATCHES", (1,))
    real = running.check_costs
    monkeypatch.setattr(running, "check_costs", lambda probe, subject, **_: real(probe, subject, seconds=0.0, steps=2))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return cases.checkpoint(tmp_path_factory.mktemp("checked") / "model")


def failing(found):
    return {(f.subject, f.name) for f in found.findings if f.verdict == "fails"}


def test_a_text_model_is_safe_and_vision_policies_have_nothing_to_do():
    found = checkup(cases.model(), cases.tokenizer())
    assert failing(found) == set(), [f for f in found.findings if f.verdict == "fails"]
    assert found.safe
    assert found.policies("not applicable") == VISION
    assert found.policies("ok") == [name for name in NAMES if name not in VISION]
    assert all("exact no-op" in f.sentence for name in VISION for f in found.of(name))
    assert [line.partition(":")[0] for line in found.words()] == [
        "Safe to use on this model",
        "Nothing to do on this model",
    ]


def test_a_vision_model_runs_every_policy_on_pictures():
    found = checkup(models.llava(), None, quick=True)
    assert failing(found) == set(), [f for f in found.findings if f.verdict == "fails"]
    assert found.policies("ok") == list(NAMES)
    assert found.inputs["told"].startswith("two random pictures, one random picture, and text alone")
    kv = {f.subject: f.numbers["kv"] for f in found.findings if f.name == "speed and memory"}
    assert all(kv[name] < 1 for name in ("DropTokens", *VISION))


def test_low_precision_is_compared_with_margins():
    with torch.random.fork_rng():
        model = cases.model().to(torch.bfloat16)
    # Angles stay as a loaded checkpoint has them.
    model.model.rotary_emb.inv_freq = cases.model().model.rotary_emb.inv_freq
    found = checkup(model, None, quick=True)
    assert failing(found) == set(), [f for f in found.findings if f.verdict == "fails"]
    assert found.tolerance > 1e-2


def test_the_same_seed_finds_the_same():
    one, two = (checkup(cases.model(), None, quick=True, policies=["SkipGPT", "MoD"], seed=3) for _ in range(2))
    assert [f.sentence for f in one.findings if "speed" not in f.name] == [
        f.sentence for f in two.findings if "speed" not in f.name
    ]
    assert list(one.settings) == ["SkipGPT", "MoD"]


def test_attention_that_ignores_the_mask_is_found():
    model = cases.model()
    attention = model.model.layers[1].self_attn
    stock = type(attention).forward
    # It sees padding, and what comes after.
    attention.forward = types.MethodType(
        lambda self, *args, **kwargs: stock(self, *args, **{**kwargs, "attention_mask": None, "is_causal": False}),
        attention,
    )
    found = checkup(model, None, quick=True, policies=["SkipModules"])
    assert ("the model", "both executors, everything computed") in failing(found)
    assert ("the model", "padding") in failing(found)
    assert not found.safe
    assert found.words()[0].startswith("Do not use sparing on this model yet: ")
    # The other checks ran all the same.
    assert {f.name for f in found.of("SkipModules")} >= {"dense = gathered", "saved", "speed and memory"}


class Leaking(Policy):
    """Skips an MLP where the last token of the batch, padding included, is even."""

    def plan_feed(self, view):
        return LayerPlan(feed=view.layer != 1 or bool(view.new.group[0, -1] == 0))


class Forgetful(Policy):
    """Decides otherwise on every second prompt."""

    def __init__(self):
        self.turn = False

    def start(self, view):
        self.turn = not self.turn

    def plan_feed(self, view):
        return LayerPlan(feed=not (self.turn and view.layer == 1))


class Breaking(Policy):
    """Raises in its second layer."""

    def plan_attend(self, view):
        if view.layer == 1:
            raise RuntimeError("no <b>second</b> layer")
        return LayerPlan()


def subject(make, **more):
    return Subject(getattr(make, "__name__", "policy"), [make], **more)


def test_policies_that_break_the_contract_are_found_and_stop_nobody():
    forgetful = Forgetful()
    found = checkup(
        cases.model(),
        None,
        quick=True,
        subjects=[
            subject(Breaking),
            subject(Leaking),
            dataclasses.replace(subject(Forgetful), make=[lambda: forgetful]),
            Subject("SkipModules", [lambda: SkipModules([1])]),
            Subject("misplaced", [lambda: SkipModules([99])]),
        ],
    )
    wrong = failing(found)
    assert ("Leaking", "padding") in wrong
    assert ("Forgetful", "dense = gathered") in wrong
    # Neither is a class that a checkpoint could name.
    assert ("Forgetful", "saved") in wrong
    assert {name for who, name in wrong if who == "Breaking"} == {f.name for f in found.of("Breaking")}
    assert all("RuntimeError: no <b>second</b> layer" in f.sentence for f in found.of("Breaking")[:3])
    assert not {who for who, _ in wrong} & {"SkipModules", "misplaced", "the model"}
    assert found.verdict("misplaced") == "not applicable"
    assert "layer 99 does not exist" in found.of("misplaced")[0].sentence
    page = render_check(found.as_dict(), {"command": "sparing check"})
    assert "no &lt;b&gt;second&lt;/b&gt; layer" in page
    assert "<b>second</b>" not in page


def test_a_vision_policy_that_touches_text_is_found():
    found = checkup(
        models.llava(), None, quick=True, subjects=[Subject("s", [lambda: SkipModules([1])], pictures=True)]
    )
    assert failing(found) == {("s", "text alone")}


def test_slow_is_a_warning(monkeypatch):
    monkeypatch.setattr(timing_of, "SLOW", 1e9)
    found = checkup(cases.model(), None, quick=True, policies=["SkipModules"])
    assert found.safe
    assert found.policies("slow") == ["SkipModules"]
    speed = found.of("SkipModules")[-1]
    assert speed.numbers["prefill_by_count"] > 1 > speed.numbers["kv"]
    assert "slower than stock on this machine" in speed.cure


def test_costs_are_measured_at_every_setting_and_two_batch_sizes(monkeypatch):
    monkeypatch.setattr(timing_of, "BATCHES", (1, 4))
    found = checkup(models.llava(), None, policies=["DropTokens"])
    for name in found.settings:
        numbers = found.of(name)[-1].numbers
        assert [(run["policy"], run["batch"]) for run in numbers["runs"]] == [
            (made, batch) for batch in (1, 4) for made in found.settings[name]
        ]
        assert all(run["prefill"] > 0 and run["decode"] > 0 and run["kv"] < 1 for run in numbers["runs"])
        one, four = (run for run in numbers["runs"] if run["policy"] == found.settings[name][0])
        # The same rows four times: the same shares, other bytes.
        assert one["kv"] == pytest.approx(four["kv"])
        assert four["kv_bytes"] == 4 * one["kv_bytes"]
        assert 0.05 < numbers["peak"] < 3
    # Four pictures are timed, of which the compared rows have two at most.
    assert found.inputs["timed"] > max(found.inputs["lengths"])


def test_peak_memory_is_less_where_every_picture_token_goes():
    subjects = [
        Subject("all", [lambda: DropTokens(groups=[Group.IMAGE], keep=0)]),
        Subject("none", [lambda: SkipModules([0], [])]),
    ]
    found = checkup(models.llava(), None, quick=True, subjects=subjects)
    peak = {name: found.of(name)[-1].numbers["peak"] for name in found.settings}
    assert peak["all"] < peak["none"]


@pytest.mark.parametrize("build", [cases.model, models.llava])
def test_the_code_of_every_policy_is_its_first_setting_and_runs(build):
    model = build()
    pictures = build is not cases.model
    inputs = models.llava_batch("left") if pictures else {"input_ids": torch.tensor([[3, 4, 5, 6]])}
    inputs = {name: value for name, value in inputs.items() if name != "position_ids"}
    for subject in subjects_for(model, pictures=pictures):
        space = {"model": model, "inputs": {**inputs, "max_new_tokens": 1, "pad_token_id": 0}}
        exec(subject.code, space)  # what the page shows
        assert [repr(part) for part in space["run"].policy.parts()] == [repr(subject.make[0]())]
        assert len(space["out"][0]) == inputs["input_ids"].shape[1] + 1


def test_the_model_is_left_as_it_was():
    model = cases.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    checkup(model, None, quick=True, policies=["SkipGPT"])
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_command_writes_a_record_and_a_page(checkpoint, tmp_path, capsys):
    command = ["check", str(checkpoint), "--quick", "--policies", "SkipModules,MoD", "--policies", "ViCA"]
    assert main([*command, "--out", str(tmp_path), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "✓ dense = gathered" in printed
    assert "– text alone" in printed
    assert "Safe to use on this model: SkipModules, MoD." in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["check.html", "run.json"]
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["status"], run["figures"]["safe"]) == ("finished", True)
    assert run["config"]["policies"] == ["SkipModules", "MoD", "ViCA"]
    page = (tmp_path / "check.html").read_text()
    assert "Quality is not judged" in page
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    assert "with sparing.apply(model, SkipModules([" in page
    assert "Train its router first" in page
    assert all(f"<dt>{f['name']}</dt><dd>{escape(MEANINGS[f['name']])}" in page for f in run["figures"]["findings"])
    # The record alone is enough for the page.
    assert "sparing check" in render_check(run["figures"], run)


def test_names_are_escaped(tmp_path):
    found = checkup(cases.model(), None, quick=True, policies=["knock_out"]).as_dict()
    found["model"]["name"] = "x<script>alert(1)</script>"
    assert "<script" not in render_check(found, {"command": "<script>"})


def test_something_unsafe_is_exit_code_1(checkpoint, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    command = ["check", str(broken), "--quick", "--policies", "SkipModules", "--out", str(tmp_path / "out")]
    assert main(command) == 1
    printed = capsys.readouterr().out
    assert "✗ loads" in printed
    assert "NaN or infinite values: model.layers.1.mlp.down_proj.weight" in printed
    assert json.loads((tmp_path / "out" / "run.json").read_text())["figures"]["safe"] is False


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["/nowhere/model"], "no such path: /nowhere/model"),
        (["MODEL", "--policies", "Magic"], "--policies Magic: there is no such policy; choose of SkipModules,"),
        (["MODEL", "--device", "tpu9"], "--device tpu9 is not available here"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(more, message, checkpoint, tmp_path, capsys):
    words = [str(checkpoint) if word == "MODEL" else word for word in more]
    assert main(["check", *words, "--out", str(tmp_path / "out")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "out").exists()


def test_a_model_under_policies_or_in_training_is_refused():
    model = cases.model()
    with pytest.raises(ValueError, match="model.eval"):
        checkup(model.train(), None)
    with pytest.raises(ValueError, match="unknown policy 'x'"):
        checkup(model.eval(), None, policies=["x"])
