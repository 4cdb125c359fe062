"""Schedules against ledgers, and settings that cost the same."""

import pytest
import torch

import models
import sparing
from sparing.policies import (
    DART,
    CDPruner,
    DivPrune,
    DropTokens,
    EnterLate,
    FastV,
    MoD,
    PyramidDrop,
    SparseVLM,
    ViCA,
    VisionZip,
    VisPruner,
    VScan,
)
from sparing.policies.budget import at_share, visual_share
from sparing.tokens import Group

POLICIES = [
    ViCA([0, 2]),
    EnterLate(1, 3),
    DropTokens(groups=[Group.IMAGE], keep=2 / 3),
    FastV(2, 1 / 3),
    PyramidDrop([1, 3], [2 / 3, 0.5]),
    DART(2, 1 / 3, image_pivots=1, text_pivots=1),
    SparseVLM([0, 2], [2 / 3, 1 / 3], recycle=0),
    DivPrune(2 / 3),
    CDPruner(1 / 3),
    VisPruner(2 / 3),
    VisionZip(2 / 3),
    VScan(2 / 3, 2, 0.5),
]


@torch.no_grad()
def visual_flops(model, inputs, policy):
    """What the ledger counts beyond a run without the picture, rankings and encoder left out."""
    costs = []
    for part in (policy, DropTokens(groups=[Group.IMAGE])):
        with sparing.apply(model, part, force=True) as run:
            model(**inputs)
        flops = run.ledger.cost().prefill.flops
        costs.append(sum(n for name, n in flops.items() if name not in ("router", "encoder")))
    return costs[0] - costs[1], run.shape


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_schedules_are_what_ledgers_count(policy):
    """Up to what the formula leaves out: pairs with the text in front, and the diagonal."""
    model, inputs = models.llava(), models.llava_batch("none")
    found, shape = visual_flops(model, inputs, policy)
    dense, _ = visual_flops(model, inputs, DropTokens(lambda tokens: tokens.valid & False))
    assert visual_share(policy, shape, pictures=models.PATCHES, text=3) == pytest.approx(found / dense, abs=0.02)


MAKES = {
    "div-prune": DivPrune,
    "fastv": lambda keep: FastV(2, keep),
    "pyramid": lambda keep: PyramidDrop([1, 2, 3], keep),
    "v-scan": lambda keep: VScan(keep, 2, 0.9),
    "dart": lambda keep: DART(1, keep),
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_settings_that_cost_the_same(make):
    """As close as a share can be; a little more would cost more."""
    shape = sparing.apply(models.llava()).shape
    policy = at_share(make, 0.7, shape)
    assert visual_share(policy, shape) == pytest.approx(0.7, abs=1e-6)
    assert visual_share(policy, shape) <= 0.7
    assert at_share(make, 1.0, shape).keep in (1.0, (1.0,) * 3)


def test_as_cheap_as_vica():
    """ViCA pays for keys alone; a method that drops pays in every layer."""
    shape = sparing.apply(models.llava()).shape
    share = visual_share(ViCA([0, 2]), shape)
    assert 0 < share < visual_share(EnterLate(2), shape)
    assert visual_share(at_share(VisionZip, share, shape), shape) == pytest.approx(share, abs=1e-6)


def test_what_cannot_be_had_is_refused():
    """With the cure."""
    shape = sparing.apply(models.llava()).shape
    with pytest.raises(ValueError, match="drop at an earlier layer"):
        at_share(lambda keep: FastV(2, keep), 0.4, shape)
    with pytest.raises(ValueError, match="above 0 and at most at 1"):
        at_share(DivPrune, 0, shape)
    for policy in (SparseVLM.paper([0]), MoD.for_model(models.llava(), capacity=0.5), FastV(1, groups=[Group.TEXT])):
        with pytest.raises(ValueError, match="only a run tells"):
            visual_share(policy, shape)


@torch.no_grad()
@pytest.mark.parametrize("choose", ["random", "uniform"])
def test_controls_keep_as_many_as_what_they_control(choose):
    """The same share is the same whole number of a picture's tokens."""
    model, inputs = models.llava(), models.llava_batch("none")
    image = inputs["input_ids"] == models.IMAGE
    for keep in torch.linspace(0.04, 0.96, 24).tolist():
        kept = []
        for policy in (DivPrune(keep), DropTokens(groups=[Group.IMAGE], keep=keep, choose=choose)):
            with sparing.apply(model, policy) as run:
                model(**inputs)
            kept.append((run.ledger.read(0) & image).sum(1).tolist())
        assert kept[0] == kept[1], keep
