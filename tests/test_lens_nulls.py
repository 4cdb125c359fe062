"""Nulls of the lenses: what they keep, what they destroy, and that a projector comes back as it was."""

import pytest
import torch

from models import llama, llava, llava_batch
from processors import CASES, family, inputs
from sparing.anatomy import anatomy_of
from sparing.lens import norm_matched, record, shuffled, untrained_projector
from sparing.tokens import Group


def test_norm_matched_keeps_norms_and_nothing_else():
    states = torch.randn(3, 500, 42) * torch.rand(3, 500, 1)
    drawn = norm_matched(states, seed=1)
    assert torch.allclose(drawn.norm(dim=-1), states.norm(dim=-1), rtol=1e-5)
    assert torch.cosine_similarity(drawn, states, dim=-1).mean().abs() < 0.02
    assert torch.equal(drawn, norm_matched(states, seed=1))
    assert not torch.equal(drawn, norm_matched(states, seed=2))
    assert norm_matched(states.bfloat16(), 0).dtype == torch.bfloat16
    assert not norm_matched(torch.zeros(2, 4), 0).any()
    seen = record(llava(), llava_batch("left"), middle=True)
    null = norm_matched(seen, 0)
    assert null.middle is None
    assert torch.equal(null.states, norm_matched(seen.states, 0))


def test_patches_are_exchanged_within_a_picture():
    model, batch = llava(), llava_batch("left")
    seen = record(model, batch, middle=True)
    null = shuffled(seen, 0)
    row, place = seen.index.T
    image = seen.tokens.group[row, place] == Group.IMAGE
    assert torch.equal(null.states[:, ~image], seen.states[:, ~image])
    assert not torch.equal(null.states[:, image], seen.states[:, image])
    for number, spans in enumerate(seen.tokens.images):
        for span in spans:
            inside = (row == number) & (place >= span.start) & (place < span.stop)
            source = torch.cdist(null.states[0, inside], seen.states[0, inside]).argmin(1)
            assert source.sort().values.tolist() == list(range(9))
            # The same exchange at every level, and between attention and MLP.
            assert torch.equal(null.states[:, inside], seen.states[:, inside][:, source])
            assert torch.equal(null.middle[:, inside], seen.middle[:, inside][:, source])


def test_patches_are_exchanged_between_pictures_in_place():
    model, batch = llava(), llava_batch("left")
    seen = record(model, batch, where=Group.IMAGE)
    null = shuffled(seen, 3, between=True)
    own, other = (each.states.unflatten(1, (4, 9)) for each in (seen, null))
    source = [next(i for i in range(4) if torch.equal(other[:, p], own[:, i])) for p in range(4)]
    assert sorted(source) == [0, 1, 2, 3]
    assert all(p != i for p, i in enumerate(source)), "no picture keeps its own"
    one = {"input_ids": batch["input_ids"][1:2], "pixel_values": batch["pixel_values"][:1]}
    one["attention_mask"] = batch["attention_mask"][1:2]
    with pytest.raises(ValueError, match="two pictures or more"):
        shuffled(record(model, one), 0, between=True)
    text = record(llama(), {"input_ids": torch.tensor([[3, 4]])})
    assert torch.equal(shuffled(text, 0, between=True).states, text.states)


@pytest.mark.parametrize("name", CASES)
def test_the_projector_is_another_one_and_comes_back(name):
    model, batch = family(name)[0], inputs(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    logits = model(**batch).logits
    level = record(model, batch, where=Group.IMAGE, levels=[0]).states
    with untrained_projector(model, seed=0) as same:
        assert same is model
        null = record(model, batch, where=Group.IMAGE, levels=[0]).states
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        mine = {id(weight) for module in anatomy_of(model).projector for weight in module.parameters()}
        assert changed
        assert {id(model.state_dict(keep_vars=True)[key]) for key in changed} <= mine
    assert not torch.allclose(null, level)
    with untrained_projector(model, seed=0):
        assert torch.equal(record(model, batch, where=Group.IMAGE, levels=[0]).states, null)
    with untrained_projector(model, seed=1):
        assert not torch.equal(record(model, batch, where=Group.IMAGE, levels=[0]).states, null)
    with pytest.raises(RuntimeError, match="inside"), untrained_projector(model, seed=0):
        raise RuntimeError("inside")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(**batch).logits, logits)


def test_models_without_a_projector():
    with pytest.raises(ValueError, match="reads text alone"), untrained_projector(llama(), 0):
        pass


def test_deepstack_mergers_are_part_of_the_projector():
    assert len(anatomy_of(family("qwen3_vl")[0]).projector) == 3
    assert len(anatomy_of(family("qwen2_5_vl")[0]).projector) == 1
