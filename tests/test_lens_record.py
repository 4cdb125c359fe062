"""`record`: it keeps what the model computes, and changes nothing."""

import pytest
import torch

import sparing
from models import llama, text_batch
from sparing.lens import record
from sparing.policies import SkipModules
from sparing.tokens import Group, TokenMap
from vision_models import FAMILIES


@pytest.mark.parametrize("side", ["left", "right"])
def test_levels_are_hugging_faces_hidden_states_before_the_final_norm(side):
    model, batch = llama(), text_batch(side)
    stock = model(**batch, output_hidden_states=True, use_cache=False)
    seen = record(model, batch, middle=True)
    row, place = seen.index.T
    for level in range(seen.depth):
        assert torch.equal(seen.at(level), stock.hidden_states[level][row, place])
    normed = model.model.norm(seen.at(seen.depth))
    assert torch.allclose(normed, stock.hidden_states[-1][row, place], atol=1e-6)
    assert torch.equal(batch["attention_mask"].bool().nonzero(), seen.index)
    # What lies between attention and MLP, by the layer's own equation.
    layer = model.model.layers[1]
    again = seen.middle[1] + layer.mlp(layer.post_attention_layernorm(seen.middle[1]))
    assert torch.allclose(again, seen.at(2), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_vision_family(family):
    build, batch_of = FAMILIES[family]
    model, batch = build(), batch_of("left")
    before = model(**batch).logits
    seen = record(model, batch, where=Group.IMAGE, levels=[0, 2])
    assert seen.levels == (0, 2)
    tokens = TokenMap.from_inputs(model, batch)
    assert torch.equal(seen.index, tokens.of(Group.IMAGE).nonzero())
    assert seen.states.shape[1] == len(seen.index) > 0
    assert torch.equal(model(**batch).logits, before), "a lens left something behind"


def test_inside_apply_it_sees_what_the_policies_make():
    model, batch = llama(), text_batch("left")
    with sparing.apply(model, SkipModules(attention=[1], mlp=[1]), execute="dense"):
        seen = record(model, batch)
    assert torch.equal(seen.at(1), seen.at(2))
    with sparing.apply(model, SkipModules(attention=[1]), execute="gathered"), pytest.raises(ValueError, match="dense"):
        record(model, batch)


def test_bad_levels_and_masks_are_refused():
    model, batch = llama(), text_batch("left")
    with pytest.raises(ValueError, match=r"levels 0\.\.3"):
        record(model, batch, levels=[4])
    with pytest.raises(ValueError, match=r"levels 0\.\.3"):
        record(model, batch, levels=[])
    with pytest.raises(ValueError, match="the mask has shape"):
        record(model, batch, where=torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="was not recorded"):
        record(model, batch, levels=[1]).at(2)
