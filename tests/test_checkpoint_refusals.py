"""What `sparing.save` and `sparing.load` refuse, each in one clear line."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparing
from checkpoint_cases import edit, files_of, refuses, save_skipping
from models import llama
from sparing.checkpoint import known_policies, registry
from sparing.policies import DropTokens, EnterLate, SkipGPT, ViCA, WaitKMask
from sparing.tokens import Group, TokenMap


class Unregistered(sparing.Policy):
    """Nobody has heard of it."""


class Forgetful(sparing.Policy):
    """Does not keep its argument."""

    def __init__(self, k=1):
        pass


class Elsewhere(torch.nn.Module, sparing.Policy):
    """Another package's."""

    def __init__(self, width: int, groups=(Group.TEXT,)):
        super().__init__()
        self.width, self.groups = width, tuple(groups)
        self.weight = torch.nn.Parameter(torch.zeros(width))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: DropTokens(lambda tokens: tokens.valid), r"DropTokens\(where=...\) is a function"),
        (lambda m: DropTokens(torch.ones(1, 3, dtype=torch.bool)), r"DropTokens\(where=...\) is a Tensor"),
        (lambda m: EnterLate(1, where=lambda tokens: tokens.valid), r"EnterLate\(where=...\) is a function"),
        (lambda m: WaitKMask(1, tokens=TokenMap.from_groups(torch.ones(1, 3))), "tokens=...\\) is a TokenMap"),
        (lambda m: ViCA([9]), "layer 9 does not exist"),
        (lambda m: SkipGPT.for_model(llama(layers=2)), "routers are for 2 layers"),
        (lambda m: sparing.ablate.knock_out([Group.TEXT], [Group.TEXT]), "ablation"),
        (lambda m: Unregistered(), "entry point group"),
    ],
)
def test_refuses_policies_at_save(make, words, tmp_path):
    """Callables, masks, misfits and strangers: one line, and nothing is written."""
    with pytest.raises(ValueError, match=words) as caught:
        sparing.save(llama(), tmp_path / "saved", [make(llama())])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_policies_of_other_packages(tmp_path, monkeypatch):
    """By entry point, with their tensors; one that forgets its arguments is told so."""

    class Point:
        def __init__(self, name, cls):
            self.name, self.load = name, lambda: cls

    points = [Point("elsewhere", Elsewhere), Point("Forgetful", Forgetful), Point("ViCA", Elsewhere)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "sparing.policies" else [])
    known_policies.cache_clear()
    try:
        assert known_policies()["ViCA"] is ViCA
        policy = Elsewhere(5, groups=[Group.IMAGE])
        policy.weight.data.normal_()
        sparing.save(llama(), tmp_path / "saved", [ViCA([0]), policy])
        _, found = sparing.run_of(sparing.load(tmp_path / "saved")[0]).policy.parts()
        assert type(found) is Elsewhere
        assert found.groups == (Group.IMAGE,)
        assert torch.equal(found.weight, policy.weight)
        with pytest.raises(ValueError, match="does not keep its argument 'k'"):
            sparing.save(llama(), tmp_path / "other", [Forgetful()])
    finally:
        known_policies.cache_clear()
    monkeypatch.undo()
    known_policies.cache_clear()
    refuses(tmp_path / "saved", "unknown policy 'elsewhere'", "ViCA", "install that package")


def test_refuses_what_does_not_fit(tmp_path):
    """Schemas, sizes, tensors, pickles, remote code, unknown policies: one clear line each."""
    saved = tmp_path / "saved"
    save_skipping(saved)
    whole = files_of(saved)

    def broken(change, *words):
        for name, content in whole.items():
            (saved / name).write_bytes(content)
        change()
        refuses(saved, *words)

    def manifest(change):
        return lambda: edit(saved / "sparing.json", change)

    def tensors(change, name="policies.safetensors"):
        def run():
            found = load_file(saved / name)
            change(found)
            save_file(found, saved / name)

        return run

    routers = "0.attend.1.weight"
    broken(manifest(lambda m: m.update(schema=2, sparing="9.9")), "schema 2 of sparing 9.9", "update sparing")
    broken(manifest(lambda m: m.update(schema="x")), "schema 'x'")
    broken(manifest(lambda m: m.pop("schema")), "no manifest")
    broken(manifest(lambda m: m.pop("base_config")), "no manifest")
    broken(manifest(lambda m: m.update(base_model_type="llava")), "base_model_type is 'llava'")
    broken(
        manifest(lambda m: (m["base_config"].update(model_type="gpt2"), m.update(base_model_type="gpt2"))),
        "'gpt2'",
        "llama",
    )
    broken(manifest(lambda m: m["base_config"].update(hidden_size=48)), "fit the config")
    broken(manifest(lambda m: m["base_config"].update(num_hidden_layers=4)), "missing")
    broken(manifest(lambda m: m["base_config"].update(num_hidden_layers=2)), "unexpected")
    broken(manifest(lambda m: m["base_config"].update(auto_map={"AutoModelForCausalLM": "code.Model"})), "its own code")
    broken(lambda: edit(saved / "config.json", lambda c: c.update(auto_map={"AutoConfig": "code.C"})), "its own code")
    broken(manifest(lambda m: m.update(weights="../other.safetensors")), "weights is")
    broken(manifest(lambda m: m["policies"][0].update({"class": "Evil"})), "unknown policy 'Evil'", "SkipGPT")
    broken(manifest(lambda m: m["policies"][0].update({"class": "os.system"})), "unknown policy 'os.system'")
    broken(manifest(lambda m: m["policies"][0]["arguments"].update(k=1)), "SkipGPT cannot be made", "'k'")
    broken(manifest(lambda m: m["policies"][0]["arguments"].update(depth=2)), "unexpected tensor '0.attend.2")
    broken(manifest(lambda m: m["policies"][0]["arguments"].update(depth=4)), "missing tensor 'attend.3")
    broken(manifest(lambda m: m["policies"][0]["arguments"].update(hidden=41)), "has shape (2, 42), expected (2, 41)")
    broken(manifest(lambda m: m.update(policies="all")), "list of policies")
    broken(manifest(lambda m: m.update(processor="LlamaTokenizer")), "LlamaTokenizer cannot be read")
    broken(tensors(lambda t: t.pop(routers)), "missing tensor 'attend.1.weight'")
    broken(tensors(lambda t: t.update(extra=torch.ones(2))), "unexpected tensor 'extra'")
    broken(tensors(lambda t: t.update({routers: torch.ones(3, 42)})), "has shape (3, 42), expected (2, 42)")
    broken(tensors(lambda t: t.pop("lm_head.weight"), "sparing.safetensors"), "missing lm_head.weight")
    broken(tensors(lambda t: t.update(extra=torch.ones(2)), "sparing.safetensors"), "unexpected extra")
    broken(lambda: (saved / "sparing.json").write_text("{nonsense"), "sparing.json")
    broken(lambda: (saved / "sparing.json").unlink(), "no sparing.json")
    broken(lambda: (saved / "policies.safetensors").unlink(), "policies.safetensors is missing")
    broken(lambda: (saved / "policies.safetensors").write_bytes(b"\xff" * 99), "corrupt")
    broken(lambda: (saved / "sparing.safetensors").write_bytes(whole["sparing.safetensors"][:999]), "corrupt")
    (saved / "sparing.safetensors").rename(saved / "pytorch_model.bin")
    (saved / "policies.safetensors").write_bytes(whole["policies.safetensors"])
    refuses(saved, "no sparing.safetensors", "pickled weights are never loaded")


def test_refuses_shards_from_elsewhere(tmp_path):
    save_skipping(tmp_path / "saved", max_shard_size=10_000)
    index = tmp_path / "saved" / "sparing.safetensors.index.json"
    edit(index, lambda i: i["weight_map"].update({"lm_head.weight": "../model.safetensors"}))
    refuses(tmp_path / "saved", "'../model.safetensors'", "no safetensors file of this folder")
    edit(index, lambda i: i["weight_map"].update({"lm_head.weight": "model.bin"}))
    refuses(tmp_path / "saved", "'model.bin'")
