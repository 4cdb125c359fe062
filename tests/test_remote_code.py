"""Checkpoints that bring code of their own: not one line of it runs unless the user says so."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import dynamic_module_utils

import sparing
from checkpoint_cases import refuses, save_skipping, tokenizer
from models import llama, text_batch
from sparing.anatomy import LlamaAnatomy, known_families, registry
from sparing.cli import main
from sparing.policies import SkipModules

MARK = "from pathlib import Path\nPath({ran!r}).write_text('ran')\n"
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = {kind!r}
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
LAYER = """
from transformers.models.llama.modeling_llama import LlamaMLP
class OwnMLP(LlamaMLP):
    def forward(self, x):
        return super().forward(x) * 2
class OwnForCausalLM(OwnForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].mlp = OwnMLP(config)
"""
TOKENIZER = "from transformers import PreTrainedTokenizerFast\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"


@pytest.fixture(autouse=True)
def modules_elsewhere(tmp_path, monkeypatch):
    """Where transformers copies such code to, and what it imported."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.fixture
def ran(tmp_path):
    """The file that the checkpoint's code writes when it runs."""
    return tmp_path / "ran"


def own_code(folder: Path, ran: Path, kind: str, extra: str = "") -> Path:
    llama().save_pretrained(folder)
    (folder / "own.py").write_text(MARK.format(ran=str(ran)) + CODE.format(kind=kind) + extra)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": kind, "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["llama", "own"])
def test_refused_until_allowed(kind, tmp_path, ran, capsys):
    """Library and CLI: one line that names the flag, for known and unknown types; nothing ran, nothing was written."""
    folder = own_code(tmp_path / "model", ran, kind)
    refuses(folder, "config.json asks to run its own code", "trust_remote_code=True", "--trust-remote-code")
    (tmp_path / "text.txt").write_text("cat")
    for command in (["check", str(folder)], ["profile", str(folder), "--text", str(tmp_path / "text.txt")]):
        assert main([*command, "--out", str(tmp_path / "out")]) == 2
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1
        assert "--trust-remote-code" in printed
    assert not ran.exists()
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "modules").exists()


@torch.no_grad()
def test_known_families_go_without(tmp_path, ran):
    """`False` takes the class of transformers; what is saved then asks for nothing any more."""
    folder = own_code(tmp_path / "model", ran, "llama")
    model, _ = sparing.load(folder, trust_remote_code=False)
    batch = text_batch("left")
    assert type(model) is type(llama())
    assert torch.equal(model(**batch).logits, llama()(**batch).logits)
    for policies in ([], [SkipModules(mlp=[1])]):
        sparing.save(model, tmp_path / "again", policies)
        sparing.load(tmp_path / "again")
    refuses(own_code(tmp_path / "other", ran, "own"), "unknown model type", "llama", trust_remote_code=False)
    assert not ran.exists()


@torch.no_grad()
def test_allowed_code_runs(tmp_path, ran, monkeypatch):
    """A subclass under a known type; its own type with an adapter, and without one; layers of its own are refused."""
    batch = text_batch("left")
    model, _ = sparing.load(own_code(tmp_path / "model", ran, "llama"), trust_remote_code=True)
    assert ran.exists()
    assert type(model).__name__ == "OwnForCausalLM"
    assert torch.equal(model(**batch).logits, llama()(**batch).logits)
    with pytest.raises(ValueError, match="OwnForCausalLM is code that came with its checkpoint"):
        sparing.save(model, tmp_path / "saved", [SkipModules(mlp=[1])])
    assert not (tmp_path / "saved").exists()
    refuses(own_code(tmp_path / "layers", ran, "llama", LAYER), "OwnMLP", "sparing.families", trust_remote_code=True)
    folder = own_code(tmp_path / "named", ran, "own", LAYER)
    refuses(folder, "unknown model family 'own'", "llama", trust_remote_code=True)

    class OwnAnatomy(LlamaAnatomy):
        """What another package would register."""

        model_types = ("own",)

    class Point:
        def load(self):
            return OwnAnatomy

    monkeypatch.setattr(registry, "entry_points", lambda group: [Point()])
    known_families.cache_clear()
    try:
        model, _ = sparing.load(folder, trust_remote_code=True)
        with sparing.apply(model, SkipModules(mlp=[1])) as run:
            model(**batch)
        assert run.ledger.cost().total < run.ledger.dense_cost().total
    finally:
        known_families.cache_clear()


@pytest.mark.parametrize("policies", [[], [SkipModules(mlp=[1])]], ids=["plain", "policies"])
def test_tokenizers_too(policies, tmp_path, ran):
    """Code of a tokenizer, in an ordinary checkpoint and in one with policies."""
    folder = sparing.save(llama(), tmp_path / "model", policies, processor=tokenizer())
    place = folder / "processor" if policies else folder
    (place / "own.py").write_text(MARK.format(ran=str(ran)) + TOKENIZER)
    config = json.loads((place / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (place / "tokenizer_config.json").write_text(json.dumps(config))
    refuses(folder, "tokenizer_config.json asks to run its own code", "trust_remote_code=True")
    assert not ran.exists()
    assert sparing.load(folder, trust_remote_code=True)[1].decode([5]) == tokenizer().decode([5])
    assert ran.exists()


def test_checkpoints_with_policies_bring_no_code(tmp_path, ran):
    """Their own config cannot be made to ask for it, at any depth, whatever the flag says."""
    folder = tmp_path / "saved"
    save_skipping(folder)
    manifest = json.loads((folder / "sparing.json").read_text())
    shutil.copytree(folder, tmp_path / "nested")
    manifest["base_config"]["auto_map"] = {"AutoConfig": "own.OwnConfig"}
    (folder / "sparing.json").write_text(json.dumps(manifest))
    manifest["base_config"] |= {"auto_map": {}, "inner": {"auto_map": {"AutoConfig": "own.OwnConfig"}}}
    (tmp_path / "nested" / "sparing.json").write_text(json.dumps({**manifest}))
    for flag in (None, True):
        refuses(folder, "its own code", trust_remote_code=flag)
        refuses(tmp_path / "nested", "its own code", trust_remote_code=flag)
