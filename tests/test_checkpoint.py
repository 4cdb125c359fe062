"""`sparing.save` and `sparing.load`: equal before and after, and never silently dense."""

import copy
import gc
import json
import weakref

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

import sparing
from checkpoint_cases import FAMILIES, files_of, processor, save_skipping, tokenizer
from models import llama, text_batch, text_family
from policy_cases import CASES, PolicyCase
from sparing.policies import DLLM, DropTokens, MoD, SkipModules, ViCA
from sparing.tokens import Group, TokenMap

# Callables are refused: DropTokens has a case of its own in place of those with a function.
SAVED = [
    *(case for case in CASES if case.name not in ("drop-keep", "drop-reindex", "mod-and-drop")),
    PolicyCase("drop-groups", lambda m: DropTokens(groups=[Group.TEXT], keep=0.7, seed=3)),
    PolicyCase("drop-reindex", lambda m: DropTokens(groups=[Group.TEXT], keep=0.7, positions="reindex")),
    PolicyCase(
        "three",
        lambda m: DropTokens(groups=[Group.TEXT], keep=0.7, seed=3) & SkipModules(attention=[1]) & SkipModules(mlp=[0]),
    ),
]
SETTINGS = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
# Every policy on text, on pictures, and on windows beside full attention; there not those that need pictures.
BUILDS = {**FAMILIES, "qwen3": (lambda: text_family("qwen3"), text_batch)}
PAIRS = [
    pytest.param(case, family, id=f"{case.name}-{family}")
    for case in SAVED
    for family in BUILDS
    if family != "qwen3" or not case.pictures
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """An ordinary checkpoint of each family."""
    return {name: sparing.save(make(), tmp_path_factory.mktemp(name)) for name, (make, _) in BUILDS.items()}


def generate(model, inputs, dtype):
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    out = model.generate(**inputs, **SETTINGS)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize(("case", "family"), PAIRS)
@torch.no_grad()
def test_generates_the_same_after_loading(case, family, plain, tmp_path):
    """Every policy, cached, in both precisions, with a tokenizer or processor and without; parameters and buffers equal.

    Pairs, not the full product: each policy and composition on Llama, on LLaVA, and on Qwen3 with windows; each family with a
    fixed policy, a vision policy and a router in `test_checkpoint_families.py`.
    """
    batch = BUILDS[family][1]
    for dtype, given in ((torch.float32, None), (torch.bfloat16, processor() if family == "llava" else tokenizer())):
        # From a file too: `.to(bfloat16)` would round the rotary frequencies, and a file's tensors are aligned otherwise
        # than those in memory, so that matrix products of odd sizes round otherwise (seen: 2e-6).
        model, _ = sparing.load(plain[family], dtype=dtype)
        inputs, policy = batch("left"), case.make(model)
        tokens = None
        if case.regroup is not None:
            tokens = case.regroup(TokenMap.from_inputs(model, inputs))
        with sparing.apply(model, policy, tokens=tokens):
            before = generate(model, inputs, dtype)
        sparing.save(model, tmp_path / "saved", [policy], processor=given)
        loaded, tools = sparing.load(tmp_path / "saved")
        parts = sparing.run_of(loaded).policy.parts()
        assert [repr(p) for p in parts] == [repr(p) for p in policy.parts()]
        assert [p.arguments() for p in parts] == [p.arguments() for p in policy.parts()]
        for ours, theirs in zip(parts, policy.parts(), strict=True):
            if isinstance(theirs, torch.nn.Module):
                assert not ours.training
                assert ours.state_dict().keys() == theirs.state_dict().keys()
                for name, tensor in theirs.state_dict().items():
                    found = ours.state_dict()[name]
                    assert found.dtype == tensor.dtype
                    assert torch.equal(found.nan_to_num(7), tensor.nan_to_num(7))
        assert type(tools) is type(given)
        if given is not None:
            assert tools.decode([5, 6]) == given.decode([5, 6])
        if tokens is not None:
            policies = sparing.release(loaded)
            with sparing.apply(loaded, policies, tokens=tokens):
                after = generate(loaded, inputs, dtype)
        else:
            after = generate(loaded, inputs, dtype)
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a, b)
        sparing.release(loaded)
        assert sparing.run_of(loaded) is None
        with sparing.apply(loaded):
            pass
        for a, b in zip(generate(model, inputs, dtype), generate(loaded, inputs, dtype), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_ordinary_checkpoint_is_stock(family, tmp_path):
    """Without policies every stock class loads it, with equal logits; so does sparing."""
    make_model, batch = FAMILIES[family]
    model, inputs = make_model(), batch("left")
    sparing.save(model, tmp_path / "saved", processor=tokenizer() if family == "llama" else None)
    auto = AutoModelForCausalLM if family == "llama" else AutoModelForImageTextToText
    expected = model(**inputs).logits
    for cls in (auto, type(model)):
        assert torch.equal(cls.from_pretrained(tmp_path / "saved").eval()(**inputs).logits, expected)
    loaded, _ = sparing.load(tmp_path / "saved")
    assert torch.equal(loaded(**inputs).logits, expected)
    assert sparing.run_of(loaded) is None
    assert sparing.release(loaded).parts() == ()
    assert not (tmp_path / "saved" / "sparing.json").exists()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [False, True])
def test_stock_loading_fails(family, shards, tmp_path):
    """Auto classes, concrete classes, configs, and a config handed in from elsewhere: each of them raises."""
    model, saved = FAMILIES[family][0](), tmp_path / "saved"
    # An ordinary checkpoint was there first: its weights must not stay where stock loading finds them.
    sparing.save(model, saved)
    save_skipping(saved, model, **({"max_shard_size": 10_000} if shards else {}))
    assert (saved / "sparing.safetensors").exists() is not shards
    for cls in (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        with pytest.raises(ValueError, match="load it with sparing.load"):
            cls.from_pretrained(saved)
    for cls in (type(model.config), type(model)):
        with pytest.raises(AttributeError, match="load it with sparing.load"):
            cls.from_pretrained(saved)
    for extra in ({}, {"use_safetensors": False}, {"ignore_mismatched_sizes": True}, {"variant": "fp16"}):
        with pytest.raises(OSError, match="no file named"):
            type(model).from_pretrained(saved, config=copy.deepcopy(model.config), **extra)
    assert sparing.run_of(sparing.load(saved)[0]) is not None


def test_back_to_an_ordinary_checkpoint(tmp_path):
    """Where a policy checkpoint was, an ordinary one leaves nothing of it."""
    save_skipping(tmp_path / "saved", processor=tokenizer())
    sparing.save(llama(), tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_a_loaded_model_cannot_lose_its_policies(tmp_path):
    """No dense copy by save_pretrained, a copy or a second apply; `save` keeps them unasked; release gives them back."""
    save_skipping(tmp_path / "saved")
    model, _ = sparing.load(tmp_path / "saved")
    for attempt, words in (
        (lambda: model.save_pretrained(tmp_path / "dense"), "use sparing.save"),
        (lambda: copy.deepcopy(model), "cannot be copied"),
        (lambda: sparing.apply(model, SkipModules(mlp=[0])).__enter__(), "SkipGPT.*sparing.release"),
        (lambda: sparing.save(model, tmp_path / "dense", []), "the model follows SkipGPT"),
        (lambda: sparing.save(model, tmp_path / "dense", [SkipModules(mlp=[0])]), "the model follows SkipGPT"),
    ):
        with pytest.raises(ValueError, match=words):
            attempt()
    assert not (tmp_path / "dense").exists()
    sparing.save(model, tmp_path / "again")
    assert files_of(tmp_path / "again")["sparing.json"] == files_of(tmp_path / "saved")["sparing.json"]
    sparing.save(model, tmp_path / "saved")  # in place of the very files it was loaded from
    again = [files_of(tmp_path / name) for name in ("saved", "again")]
    assert [again[0][name] for name in again[0] if name != "README.md"] == [
        again[1][name] for name in again[1] if name != "README.md"
    ]
    with sparing.apply(model, sparing.release(model), SkipModules(mlp=[0])) as run:
        assert len(run.policy.parts()) == 3
        sparing.save(model, tmp_path / "three")
    assert len(sparing.run_of(sparing.load(tmp_path / "three")[0]).policy.parts()) == 3
    model.save_pretrained(tmp_path / "dense")
    assert sparing.run_of(sparing.load(tmp_path / "dense")[0]) is None


def test_mod_dllm_names(tmp_path):
    """Presets are saved as what they stand for."""
    model = llama()
    policies = [MoD.for_model(model, "paper"), DLLM.for_model(model, "lrm-pruning", sample=False)]
    sparing.save(model, tmp_path / "saved", policies)
    entries = json.loads((tmp_path / "saved" / "sparing.json").read_text())["policies"]
    assert entries[0]["arguments"]["route"] == "block"
    assert entries[1]["arguments"]["router"] == "linear"


def test_push_to_hub(tmp_path, monkeypatch):
    """The usual upload of the folder, which also takes earlier ordinary weights away."""
    calls = []

    class Api:
        def create_repo(self, repo_id, **kwargs):
            calls.append(("create", repo_id, kwargs))

        def upload_folder(self, **kwargs):
            calls.append(("upload", kwargs))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    folder = sparing.save(llama(), tmp_path / "saved", [ViCA([0])], push_to_hub="someone/sparse")
    assert calls[0] == ("create", "someone/sparse", {"exist_ok": True})
    sent = calls[1][1]
    assert (sent["repo_id"], sent["folder_path"]) == ("someone/sparse", folder)
    assert {"model*.safetensors", "pytorch_model*.bin"} <= set(sent["delete_patterns"])
    assert 'sparing.load("someone/sparse")' in (folder / "README.md").read_text()


def test_loads_from_the_hub(tmp_path, monkeypatch):
    """A hub id with a sparing.json is fetched whole, and loaded like a folder."""
    folder = sparing.save(llama(), tmp_path / "saved", [ViCA([0])])
    monkeypatch.setattr("transformers.utils.hub.cached_file", lambda *a, **k: str(folder / "sparing.json"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(folder))
    model, _ = sparing.load("someone/sparse", revision="main")
    assert repr(sparing.run_of(model)) == "ViCA([0], prefix='update')"


def test_card(tmp_path):
    """Licence and base are handed down, figures are named, and the example in it is true."""
    model = copy.deepcopy(llama())
    model.name_or_path = "someone/their-llama"
    first = sparing.save(
        model, tmp_path / "first", [ViCA([0])], license="mit", figures={"speedup": 1.83333, "seeds": 3}
    )
    text = (first / "README.md").read_text()
    for words in (
        'license: "mit"',
        'base_model: "someone/their-llama"',
        "ViCA([0]",
        "| speedup | 1.833 |",
        "| seeds | 3 |",
    ):
        assert words in text
    loaded, _ = sparing.load(first)
    assert 'license: "mit"' in (sparing.save(loaded, tmp_path / "second") / "README.md").read_text()
    assert str(tmp_path) not in (tmp_path / "second" / "README.md").read_text()


def test_a_loaded_model_can_be_freed(tmp_path):
    """The run that stays on it does not keep it alive."""
    save_skipping(tmp_path / "saved")
    model, _ = sparing.load(tmp_path / "saved")
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
