"""`sparing.load` and `TokenMap.from_inputs`: what works, and one clear line for what does not."""

import json
import shutil

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import sparing
from models import PATCHES, llama, llava, llava_batch, text_batch
from sparing.tokens import Group, ImageSpan


@pytest.fixture
def checkpoint(tmp_path):
    llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_loads_what_was_saved(checkpoint, tmp_path):
    """Text and vision, at the asked precision; no tokenizer files, no tokenizer."""
    model, tokenizer = sparing.load(checkpoint)
    ids = text_batch("none")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, llama()(ids).logits)
    assert tokenizer is None
    assert not model.training
    assert next(sparing.load(str(checkpoint), dtype="bfloat16")[0].parameters()).dtype == torch.bfloat16
    llava().save_pretrained(tmp_path / "vision")
    model, _ = sparing.load(tmp_path / "vision")
    inputs = llava_batch("left")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, llava()(**inputs).logits)


def refuses(path, *words, **kwargs):
    with pytest.raises(ValueError) as caught:
        sparing.load(path, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def test_refuses_bad_paths(tmp_path, checkpoint):
    """A path that is not there, a file, an empty folder, no weights, pickles only."""
    refuses(tmp_path / "nowhere", "no such path")
    refuses("./nowhere/at/all", "no such path")
    (tmp_path / "file").write_text("x")
    refuses(tmp_path / "file", "is a file")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", "no config.json")
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    refuses(checkpoint, "pickled weights", "save_pretrained")
    (checkpoint / "pytorch_model.bin").unlink()
    refuses(checkpoint, "no *.safetensors")
    (checkpoint / "model.safetensors").touch()
    (checkpoint / "config.json").write_text("{nonsense")
    refuses(checkpoint, "not valid JSON")


def test_refuses_unknown_models(tmp_path, checkpoint):
    """Encoders, other decoders, made-up types and remote code: known families are named."""
    BertModel(
        BertConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=13)
    ).save_pretrained(tmp_path / "bert")
    refuses(tmp_path / "bert", "unknown model family 'bert'", "llama", "llava")
    other = GPT2LMHeadModel(GPT2Config(n_embd=12, n_layer=1, n_head=2, vocab_size=17))
    other.save_pretrained(tmp_path / "gpt2")
    refuses(tmp_path / "gpt2", "unknown model family 'gpt2'", "llama", "llava")
    with pytest.raises(ValueError, match="unknown model family 'gpt2'.*llama"):
        sparing.apply(other)
    with pytest.raises(ValueError, match="no language-model head"):
        sparing.apply(llama().model)
    config = json.loads((checkpoint / "config.json").read_text())
    for change, words in (
        ({"model_type": "made_up"}, ("made_up", "llama")),
        ({"model_type": "evil", "auto_map": {"AutoModelForCausalLM": "code.Model"}}, ("its own code", "llama")),
    ):
        (checkpoint / "config.json").write_text(json.dumps({**config, **change}))
        refuses(checkpoint, *words)


def test_refuses_unfitting_weights(tmp_path, checkpoint):
    """Truncated and corrupt files; tensors missing, extra or of another shape; unknown precision; arguments under another name."""
    refuses(checkpoint, "unknown dtype", "bfloat16", dtype="int3")
    refuses(checkpoint, "give attention=", attn_implementation="eager")
    whole = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refuses(checkpoint, "corrupt")
    (checkpoint / "model.safetensors").write_bytes(b"\xff" * 1000)
    refuses(checkpoint, "corrupt")
    (checkpoint / "model.safetensors").write_bytes(whole)
    config = json.loads((checkpoint / "config.json").read_text())
    for change, word in (
        ({"num_hidden_layers": 4}, "missing"),
        ({"num_hidden_layers": 2}, "unexpected"),
        ({"intermediate_size": 59}, "fit the config"),
    ):
        copy = tmp_path / f"changed{word}"
        shutil.copytree(checkpoint, copy)
        (copy / "config.json").write_text(json.dumps({**config, **change}))
        refuses(copy, word)


@pytest.mark.parametrize("side", ["left", "right"])
def test_token_map(side):
    """Groups, spans and grids of a batch with several pictures, a picture at the start, and text alone."""
    inputs = llava_batch(side)
    tokens = sparing.TokenMap.from_inputs(llava(), inputs)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    assert torch.equal(tokens.valid, mask)
    assert torch.equal(tokens.of(Group.IMAGE), ids == 96)
    assert [len(row) for row in tokens.images] == [2, 1, 1, 0]
    for row, spans in enumerate(tokens.images):
        for span in spans:
            assert span.stop - span.start == PATCHES
            assert span.grid == (3, 3)
            assert (ids[row, span.start : span.stop] == 96).all()
    assert tokens.of(Group.SYSTEM).sum(1).tolist() == [3, 0, 1, 0]
    assert tokens.padded
    assert tokens.has(Group.SYSTEM)
    assert not tokens.has(Group.TARGET)


def test_token_map_refusals():
    """Image tokens that make no whole picture, 4-D masks, no ids."""
    model = llava()
    with pytest.raises(ValueError, match="row 0 has 8 image tokens.*9 a picture"):
        sparing.TokenMap.from_inputs(model, {"input_ids": torch.tensor([[5, *[96] * 8, 6]])})
    with pytest.raises(ValueError, match="interrupted"):
        sparing.TokenMap.from_inputs(model, {"input_ids": torch.tensor([[*[96] * 4, 6, *[96] * 5]])})
    with pytest.raises(ValueError, match="2-D padding mask"):
        sparing.TokenMap.from_inputs(
            model, {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 1, 3, 3)}
        )
    with pytest.raises(ValueError, match="neither input_ids nor"):
        sparing.TokenMap.from_inputs(model, {})


def test_token_map_edits():
    """Windows, extension, selection and cropping agree with doing the same to the ids."""
    tokens = sparing.TokenMap.from_inputs(llava(), llava_batch("left"))
    rows = torch.tensor([2, 0, 0])
    picked = tokens.select(rows)
    assert torch.equal(picked.group, tokens.group[rows])
    assert picked.images == tuple(tokens.images[i] for i in rows.tolist())
    tail = sparing.TokenMap.from_groups(torch.full((4, 2), int(Group.TEXT)))
    longer = tokens.extend(tail)
    assert longer.length == tokens.length + 2
    assert torch.equal(longer.crop(tokens.length).group, tokens.group)
    assert longer.crop(13).images[0] == (ImageSpan(3, 12, (3, 3)),)
