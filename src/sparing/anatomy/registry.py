"""Find the anatomy of a model; other packages add families by the entry point `sparing.families`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from torch import nn

from sparing.anatomy.base import Anatomy
from sparing.anatomy.gemma import GemmaAnatomy
from sparing.anatomy.internvl import InternVLAnatomy
from sparing.anatomy.llama import LlamaAnatomy
from sparing.anatomy.llava import LlavaAnatomy
from sparing.anatomy.llava_onevision import LlavaOnevisionAnatomy
from sparing.anatomy.mistral import MistralAnatomy
from sparing.anatomy.phi3 import Phi3Anatomy
from sparing.anatomy.qwen import Qwen2Anatomy, Qwen3Anatomy
from sparing.anatomy.qwen_vl import Qwen2_5VLAnatomy, Qwen3VLAnatomy
from sparing.anatomy.smollm3 import SmolLM3Anatomy
from sparing.anatomy.smolvlm import SmolVLMAnatomy
from sparing.anatomy.vision import VisionAnatomy
from sparing.tokens import TokenMap

FAMILIES: tuple[type[Anatomy], ...] = (
    GemmaAnatomy,
    InternVLAnatomy,
    LlamaAnatomy,
    LlavaAnatomy,
    LlavaOnevisionAnatomy,
    MistralAnatomy,
    Phi3Anatomy,
    Qwen2Anatomy,
    Qwen2_5VLAnatomy,
    Qwen3Anatomy,
    Qwen3VLAnatomy,
    SmolLM3Anatomy,
    SmolVLMAnatomy,
)


WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
"""What training loops put around a model."""


@functools.cache
def known_families() -> Mapping[str, type[Anatomy]]:
    """Model types and their adapters: ours, and those of installed packages."""
    found = {name: family for family in FAMILIES for name in family.model_types}
    for point in entry_points(group="sparing.families"):
        family = point.load()
        for name in family.model_types:
            found.setdefault(name, family)
    return found


def anatomy_of(model: nn.Module) -> Anatomy:
    """The adapter of a model's family; of the model inside, where PEFT wraps it.

    Raises:
        ValueError: the family is unknown, a text decoder inside is, the model has no language-model head, or `torch.compile`
            wraps it.
    """
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "this is what torch.compile returned: give the model inside it (model._orig_mod) here; the compiled one then follows too"
        )
    if type(model).__name__ in WRAPPERS and hasattr(model, "module"):
        raise ValueError(
            f"this is {type(model).__name__} around a model: give the model inside it (model.module) here; the wrapper follows too"
        )
    model = getattr(model, "get_base_model", lambda: model)()
    families = known_families()
    known = ", ".join(sorted(families))
    config = getattr(model, "config", None)
    name = getattr(config, "model_type", type(model).__name__)
    if config is None or name not in families:
        raise ValueError(f"unknown model family {name!r} ({type(model).__name__}); known families: {known}")
    outer, inner = families[name], config.get_text_config().model_type
    if issubclass(outer, VisionAnatomy):
        inner = outer.decoders.get(inner, inner)
    if inner != name and inner not in families:
        raise ValueError(f"{name} with a {inner!r} decoder inside is unknown; known decoders: {known}")
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise ValueError(
            f"{type(model).__name__} has no language-model head: load it as a causal language model (sparing.load does)"
        )
    return _with_decoder(outer, families.get(inner, outer))(model)


@functools.cache
def _with_decoder(outer: type[Anatomy], decoder: type[Anatomy]) -> type[Anatomy]:
    """The adapter of a model around a decoder: what the outer one does not say about layers, the decoder's does."""
    if issubclass(outer, decoder):
        return outer
    return type(f"{outer.__name__}With{decoder.__name__}", (outer, decoder), {"__doc__": outer.__doc__})


def read_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> TokenMap:
    """What `TokenMap.from_inputs` calls."""
    return anatomy_of(model).read_tokens(inputs)


def fingerprint(model: nn.Module) -> str:
    """Says which checkpoint a model is, by its weights: what a `TokenProfile` is keyed to.

    Raises:
        ValueError: an unknown family.
    """
    return anatomy_of(model).fingerprint()
