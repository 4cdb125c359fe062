"""`VisionPrefix`: questions about held pictures equal plain `apply` on the same inputs, and share what is held."""

import pytest
import torch

import processors
import sparing
from models import llava, llava_batch
from sparing.plan import Composed
from sparing.policies import DropTokens, EnterLate, FastV, PyramidDrop, SkipModules, ViCA
from sparing.tokens import Group
from vision_models import FAMILIES, IMAGE

TOLERANCE = 1e-5
PIXELS = ("pixel_values", "pixel_attention_mask")
BATCHES = {"llava": (llava, llava_batch), **FAMILIES}
POLICIES = {
    "vica": lambda: ViCA([0, 2]),
    "freeze": lambda: ViCA([1, 2], prefix="freeze"),
    "late": lambda: ViCA([2]),
    "dropped": lambda: ViCA([0, 2]) & DropTokens(groups=[Group.IMAGE], keep=0.5),
    "skipped": lambda: ViCA([0, 2]) & SkipModules([1], [2], groups=[Group.TEXT]),
    "entering": lambda: ViCA([0, 2]) & EnterLate(1),
    "fastv": lambda: ViCA([0, 1, 2]) & FastV(1, 0.5),
    "pyramid": lambda: ViCA([0, 1, 2]) & PyramidDrop([1, 2], 0.6),
}


def relative(a, b, mask):
    return ((a - b)[mask].abs().max() / b[mask].abs().max()).item()


def asked(inputs):
    """A batch without its pixels."""
    return {name: value for name, value in inputs.items() if name not in PIXELS}


def decoded(model, inputs, extra):
    """Logits of a prompt, a chunk of three and single tokens, at the model's positions; and the cache."""
    out = model(**inputs, use_cache=True)
    logits, mask = [out.logits], inputs["attention_mask"]
    position, deltas = mask.sum(1, keepdim=True), getattr(model.model, "rope_deltas", None)
    for chunk in (extra[:, :3], *extra[:, 3:].split(1, dim=1)):
        n = chunk.shape[1]
        mask = torch.cat([mask, torch.ones(len(mask), n, dtype=mask.dtype)], dim=1)
        ids = position + torch.arange(n)
        position = position + n
        ids = ids if deltas is None else (ids + deltas).expand(3, -1, -1)
        out = model(chunk, attention_mask=mask, position_ids=ids, past_key_values=out.past_key_values)
        logits.append(out.logits)
    return logits, out.past_key_values


def compare(model, inputs, policy, prefix, pictures=None, held=None):
    """Prefill (with every hidden state) and cached decoding of both."""
    extra = torch.randint(3, 90, (len(inputs["input_ids"]), 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with sparing.apply(model, policy) as run:
            plain, _ = decoded(model, inputs, extra)
            hidden = model(**inputs, output_hidden_states=True).hidden_states
            states = run.ledger.states()
        with prefix.apply(pictures=pictures) as run:
            ours, cache = decoded(model, asked(inputs), extra)
            ledger = run.ledger
            found = model(**asked(inputs), output_hidden_states=True).hidden_states
            assert torch.equal(run.ledger.states(), states)
    mask = inputs["attention_mask"].bool()
    assert relative(ours[0], plain[0], mask) <= TOLERANCE
    for a, b in zip(ours[1:], plain[1:], strict=True):
        assert relative(a, b, torch.ones(a.shape[:2], dtype=torch.bool)) <= TOLERANCE
    for a, b in zip(found, hidden, strict=True):
        assert relative(a, b, mask) <= TOLERANCE
    return ledger, cache


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", BATCHES)
def test_equals_apply(family, side):
    """Rows of two pictures, none, one and one, under each family: prefill and cached decoding."""
    build, batch = BATCHES[family]
    model, inputs = build(), batch(side)
    compare(model, inputs, ViCA([0, 2]), sparing.VisionPrefix.from_inputs(model, inputs, ViCA([0, 2])))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_composes(family, policy):
    """With policies that drop pictures before or inside the decoder, that skip text, that let pictures in late."""
    build, batch = BATCHES[family]
    model, inputs = build(), batch("left")
    made = POLICIES[policy]()
    compare(model, inputs, made, sparing.VisionPrefix.from_inputs(model, inputs, made))
