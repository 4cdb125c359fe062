"""Which attention function a model runs, in which form it takes masks, and what each executor can do with it."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from typing import Any

from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class Masks(enum.Enum):
    """How an attention function takes a mask that says of every query and key whether they meet."""

    BOOLEAN = "boolean"
    """`[b 1 q k]`, true where a query may read a key."""
    ADDED = "added"
    """`[b 1 q k]`, added to the scores: 0, or the smallest number of the dtype."""
    NONE = "none"
    """It takes none: padding and causality alone."""


# torch 2.13's compiled flex attention aborts the whole process on a CPU where masks are added to its scores (seen; on a GPU untried).
ABORTS_ON = ("cpu",)
CURE = "call model.set_attn_implementation('{}'), or load the model with attn_implementation='{}'"


def masks_of(attention: Any, name: str, *, exact: bool, capped: bool) -> Masks:
    """The form in which the attention function of a model takes masks.

    The function that would run decides, not its name: kernels of the hub and functions of the user are registered under names of
    their own, and a known name can be given another function.

    Args:
        attention: an attention module of the model.
        name: the model's attention implementation.
        exact: only functions that are known to compute softmax attention with the family's own scores will do (the fast executor
            computes attention itself); otherwise any that takes a mask.
        capped: whether scores are capped, which SDPA cannot.

    Raises:
        ValueError: the function does not take masks as `exact` asks, or belongs to a paged cache.
    """
    cure = CURE.format(*["eager" if capped else "sdpa"] * 2)
    if name.startswith("paged|"):
        raise ValueError(f"{name!r} attention reads a paged cache, which holds no plan: {cure}")
    function = _registered(attention, name)
    if function is flex_attention_forward and not exact and next(attention.parameters()).device.type in ABORTS_ON:
        raise ValueError(
            f'{name!r} attention with the masks of execute="dense" makes torch abort on a CPU: use execute="gathered", or {cure}'
        )
    if function is None or function is sdpa_attention_forward or function is flex_attention_forward:
        return Masks.BOOLEAN if function is sdpa_attention_forward else Masks.ADDED
    flash = function is flash_attention_forward
    if exact:
        if flash:
            return Masks.NONE
        raise ValueError(
            f'execute="gathered" computes attention itself, and cannot know what the registered {name!r} computes: '
            f'use execute="dense", or {cure}'
        )
    if flash:
        raise ValueError(f'{name!r} attention takes no mask of queries and keys, which execute="dense" needs: {cure}')
    maker = ALL_MASK_ATTENTION_FUNCTIONS.get(name)
    if maker is None:
        raise ValueError(
            f"{name!r} attention has no mask function, so transformers hides no key from it, not even padding: "
            f"AttentionMaskInterface.register({name!r}, sdpa_mask) if it takes masks as sdpa does, or {cure}"
        )
    if maker is sdpa_mask or maker is eager_mask:
        return Masks.BOOLEAN if maker is sdpa_mask else Masks.ADDED
    raise ValueError(
        f"{name!r} attention has a mask function of its own, whose masks sparing cannot write: register sdpa_mask or "
        f"eager_mask for it if it takes such masks, or {cure}"
    )


def _registered(attention: Any, name: str) -> Callable[..., Any] | None:
    """The function of that name, in the family's own registry where it has one; `None` for the family's eager attention."""
    registry: Any = getattr(sys.modules[type(attention).__module__], "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    function = registry.get(name)
    if function is None and name != "eager":
        raise ValueError(f"{name!r} attention is not registered with transformers: " + CURE.format("sdpa", "sdpa"))
    return function
