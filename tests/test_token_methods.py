"""Studies of token classes and ablations: what a YAML says becomes the policy, or a reason why it cannot."""

import pytest
import torch

import sparing
from models import llama
from sparing import zoo
from sparing.evaluate.task import NotApplicable, Subject
from sparing.policies import DropTokens, OfClass
from sparing.study.methods import tokens as token_methods
from sparing.study.methods.known import known_methods
from sparing.study.methods.tokens import Ablation, TokenClass, profile_of
from sparing.tokens import Group, TokenProfile
from sparing.tokens.profile import Anchor
from sparing.worlds.scenes import WORLD


@pytest.fixture(scope="module")
def shipped():
    return Subject(*sparing.load(zoo.path("scenes-llava"), dtype=torch.float32))


@pytest.fixture
def classes(shipped, monkeypatch):
    """A profile by hand: whatever lies towards one direction is dead."""
    direction = torch.nn.functional.normalize(torch.randn(192, generator=torch.Generator().manual_seed(0)), dim=0)
    profile = TokenProfile(
        checkpoint=sparing.anatomy.fingerprint(shipped.model),
        anchors=(Anchor(("dead",), tuple(direction.tolist()), 0.0),),
        shares={"dead": 0.5, "alive": 0.5},
        notes=("no sinks",),
    )
    monkeypatch.setattr(token_methods, "profile_of", lambda *_: profile)
    return profile


def test_both_are_known_to_studies():
    assert known_methods()["token_class"] is TokenClass
    assert known_methods()["ablation"] is Ablation


def test_a_class_becomes_a_policy_for_its_tokens(shipped, classes):
    made = TokenClass(classes=("dead",)).prepare(shipped, seed=0)
    (policy,) = made.subject.policies
    assert isinstance(policy, DropTokens)
    assert isinstance(policy.where, OfClass)
    assert made.details == {"shares": {"dead": 0.5, "alive": 0.5}, "notes": ["no sinks"]}
    control = TokenClass(classes=("dead",), control="random", policy="SkipModules", arguments={"attention": [1]})
    assert control.seeded
    assert not TokenClass(classes=("dead",), control="background").seeded
    (skip,) = control.prepare(shipped, seed=3).subject.policies
    assert skip.where.seed == 3
    with pytest.raises(NotApplicable, match="has no sink"):
        TokenClass(classes=("sink",)).prepare(shipped, seed=0)


def test_classes_by_words(shipped, classes):
    made = TokenClass(classes=("dead",), words={"dead": ("nothing",)}).prepare(shipped, seed=0).subject.policies[0]
    assert made.where.profile.rule == "words"
    assert made.where.profile.words == {"dead": (shipped.tokenizer.convert_tokens_to_ids("nothing"),)}
    with pytest.raises(NotApplicable, match="no word 'xyzzy'"):
        TokenClass(classes=("dead",), words={"dead": ("xyzzy",)}).prepare(shipped, seed=0)


def test_ablations_by_group_and_by_class(shipped, classes):
    cut = Ablation(do="knock_out", arguments={"queries": "IMAGE", "keys": "IMAGE", "renormalise": True})
    assert not cut.seeded
    made = cut.prepare(shipped, seed=0).subject
    assert made.execute == "dense"
    assert made.policies[0].ablation
    scaled = Ablation(do="scale_norms", classes=("dead",), arguments={"where": "classes", "factor": 0.1})
    assert scaled.prepare(shipped, seed=0).subject.policies[0].ablation
    assert Ablation(do="replace", arguments={"where": "IMAGE", "by": "noise"}).seeded


def test_without_classes_it_is_all_picture_tokens(shipped):
    made = TokenClass(policy="EnterLate", arguments={"entry": 2}).prepare(shipped, seed=0).subject
    assert made.policies[0].groups == (Group.IMAGE,)


def test_profiles_are_found_once(shipped, monkeypatch):
    called = []
    monkeypatch.setattr(token_methods, "token_classes", lambda *a, **k: called.append(k["rule"]) or TokenProfile("x"))
    monkeypatch.setattr(token_methods, "_PROFILES", {})
    for _ in range(2):
        profile_of(shipped, WORLD, 8, "anchors")
    assert called == ["anchors"]
    profile_of(shipped, WORLD, 8, "release")
    assert called == ["anchors", "release"]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (TokenClass(control="random"), "a control of which classes"),
        (TokenClass(policy="ViCA"), "policy for chosen tokens"),
        (TokenClass(arguments={"positons": "keep"}), "positions"),
        (Ablation(do="knockout"), "knock_out"),
        (Ablation(do="replace", arguments={"were": "IMAGE"}), "where"),
        (Ablation(do="replace", arguments={"where": "IMAGES"}), "IMAGE"),
        (Ablation(do="replace", arguments={"where": "classes"}), "name them under"),
    ],
)
def test_settings_are_checked(method, message):
    with pytest.raises(ValueError, match=message):
        method.check()


def test_text_models_and_missing_layers_do_not_apply(shipped, tmp_path):
    with pytest.raises(NotApplicable, match="cannot be found"):
        TokenClass(classes=("dead",)).prepare(Subject(llama(), None), seed=0)
    with pytest.raises(NotApplicable, match="layer 99"):
        Ablation(do="scale_norms", arguments={"where": "IMAGE", "factor": 2.0, "layer": 99}).prepare(shipped, seed=0)
    with pytest.raises(ValueError, match="at least 8 pictures"):
        TokenClass(classes=("dead",), pictures=tmp_path).check()
