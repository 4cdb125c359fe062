"""Which family a model is of: refusals that name what is known, and families of other packages."""

import copy
import functools
import types

import pytest
import torch

import sparing
from models import llama, text_batch, text_family
from sparing.anatomy import Anatomy, anatomy_of, registry
from test_parity import TOLERANCE, relative


def changed(model, **changes):
    """The model with another config, its weights as they are."""
    model = copy.copy(model)
    config = copy.copy(model.config)
    for key, value in changes.items():
        setattr(config, key, value)
    model.__dict__ = {**model.__dict__, "config": config}
    return model


def test_refusals():
    """Each names what is unknown and what is known."""
    new_kind = changed(text_family("qwen3"), layer_types=["full_attention", "linear_attention", "full_attention"])
    with pytest.raises(ValueError, match=r"'linear_attention' layers is unknown.*full_attention, sliding_attention"):
        sparing.apply(new_kind)
    with pytest.raises(
        ValueError, match="'sliding_attention' layers is unknown; known kinds of layers: full_attention"
    ):
        sparing.apply(changed(llama(), layer_types=["sliding_attention"] * 3))
    with pytest.raises(ValueError, match="both directions"):
        sparing.apply(changed(text_family("gemma3"), use_bidirectional_attention=True))
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        sparing.apply(changed(text_family("gemma2"), _attn_implementation_internal="sdpa"))
    with pytest.raises(ValueError, match=r"unknown model family 'gemma3'.*gemma3_text"):
        sparing.apply(changed(text_family("gemma3"), model_type="gemma3"))


class ToyAnatomy(Anatomy):
    """What another package could bring."""

    model_types = ("toy", "llama")

    @property
    def decoder(self):
        return self.model.model


@pytest.fixture
def toy_package(monkeypatch):
    point = types.SimpleNamespace(name="toy", load=lambda: ToyAnatomy)

    def entry_points(group):
        return [point] if group == "sparing.families" else []

    monkeypatch.setattr(registry, "entry_points", entry_points)
    monkeypatch.setattr(registry, "known_families", functools.cache(registry.known_families.__wrapped__))


def test_families_of_other_packages(toy_package):
    """By the entry point `sparing.families`; ours come first."""
    families = registry.known_families()
    assert families["toy"] is ToyAnatomy
    assert families["llama"] is not ToyAnatomy
    model, inputs = changed(llama(), model_type="toy"), text_batch("left")
    assert type(anatomy_of(model)) is ToyAnatomy
    with torch.no_grad():
        stock = model(**inputs).logits
        with sparing.apply(model, force=True):
            assert relative(model(**inputs).logits, stock, inputs["attention_mask"]) <= TOLERANCE
    with pytest.raises(ValueError, match="known families: .*toy"):
        anatomy_of(changed(llama(), model_type="made-up"))
