"""Find the anatomy of a model; other packages add families by the entry point `sparing.families`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from torch import nn

from sparing.anatomy.base import Anatomy
from sparing.anatomy.llama import LlamaAnatomy
from sparing.anatomy.llava import LlavaAnatomy
from sparing.tokens import TokenMap

FAMILIES: tuple[type[Anatomy], ...] = (LlamaAnatomy, LlavaAnatomy)


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
    model = getattr(model, "get_base_model", lambda: model)()
    families = known_families()
    known = ", ".join(sorted(families))
    config = getattr(model, "config", None)
    name = getattr(config, "model_type", type(model).__name__)
    if config is None or name not in families:
        raise ValueError(f"unknown model family {name!r} ({type(model).__name__}); known families: {known}")
    inner = config.get_text_config().model_type
    if inner != name and inner not in families:
        raise ValueError(f"{name} with a {inner!r} decoder inside is unknown; known decoders: {known}")
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise ValueError(
            f"{type(model).__name__} has no language-model head: load it as a causal language model (sparing.load does)"
        )
    return families[name](model)


def read_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> TokenMap:
    """What `TokenMap.from_inputs` calls."""
    return anatomy_of(model).read_tokens(inputs)
