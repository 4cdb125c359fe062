"""Policies of a study at the cost of others: what is kept follows from what may be spent."""

import pytest
import torch

import sparing
from models import llama
from sparing import zoo
from sparing.evaluate.task import NotApplicable, Subject
from sparing.policies import DropTokens, FastV, SparseVLM
from sparing.policies.budget import visual_share
from sparing.policies.vica import ViCA
from sparing.study.methods.known import known_methods
from sparing.study.methods.visual_cost import AtVisualCost

SIZES = {"pictures": 100, "text": 8}


@pytest.fixture(scope="module")
def shipped():
    return Subject(*sparing.load(zoo.path("scenes-llava"), dtype=torch.float32))


def shape(subject):
    return sparing.anatomy.anatomy_of(subject.model).shape()


def test_it_is_a_method():
    assert known_methods()["at_visual_cost"] is AtVisualCost


def test_it_spends_what_vica_does_and_no_more(shipped):
    made = AtVisualCost(policy="DivPrune", budget=8, **SIZES).prepare(shipped, seed=0)
    (policy,) = made.subject.policies
    vica = visual_share(ViCA(range(8)), shape(shipped), **SIZES)
    assert made.details["budget"] == pytest.approx(vica)
    assert vica - 0.001 < visual_share(policy, shape(shipped), **SIZES) <= vica
    assert 0 < policy.keep < 0.2


def test_a_share_may_be_given_and_stages_share_it(shipped):
    (policy,) = (
        AtVisualCost(policy="SparseVLM", arguments={"layers": [1, 3]}, budget="40%", **SIZES)
        .prepare(shipped, seed=0)
        .subject.policies
    )
    assert isinstance(policy, SparseVLM)
    assert len(policy.keep) == 2
    assert policy.keep[0] == policy.keep[1]
    assert visual_share(policy, shape(shipped), **SIZES) == pytest.approx(0.4, abs=0.01)
    (policy,) = (
        AtVisualCost(policy="FastV", arguments={"layer": 1}, budget="30%", **SIZES)
        .prepare(shipped, seed=0)
        .subject.policies
    )
    assert isinstance(policy, FastV)


def test_what_draws_has_the_cells_seed(shipped):
    method = AtVisualCost(policy="DropTokens", arguments={"groups": [{"group": "IMAGE"}]}, budget="30%", **SIZES)
    assert method.seeded
    (policy,) = method.prepare(shipped, seed=3).subject.policies
    assert isinstance(policy, DropTokens)
    assert policy.seed == 3
    assert not AtVisualCost(policy="DivPrune").seeded


def test_what_cannot_be_is_said(shipped):
    late = AtVisualCost(policy="FastV", arguments={"layer": 4}, budget=2, **SIZES)
    with pytest.raises(NotApplicable, match="drop at an earlier"):
        late.prepare(shipped, seed=0)
    with pytest.raises(NotApplicable, match="more than the model's 8"):
        AtVisualCost(budget=9, **SIZES).prepare(shipped, seed=0)
    for wrong, match in (
        (AtVisualCost(policy="SkipModules"), "policy that keeps a share"),
        (AtVisualCost(arguments={"kep": 1}), "kep"),
        (AtVisualCost(arguments={"keep": 1}), "beside keep"),
        (AtVisualCost(budget=0), "blind"),
        (AtVisualCost(budget="half"), "neither a number of layers"),
        (AtVisualCost(text=0), "at least one token"),
    ):
        with pytest.raises(ValueError, match=match):
            wrong.check()


def test_a_text_model_has_nothing_to_drop_but_runs():
    made = AtVisualCost(policy="DivPrune").prepare(Subject(llama(), None), seed=0)
    assert made.subject.policies
