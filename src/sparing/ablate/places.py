"""Which tokens of a prompt an ablation speaks of: groups, a selection, a function, a mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparing.plan import PromptView, Selection
from sparing.plan.selection import chosen_in
from sparing.tokens import Group, TokenMap

Where = Group | Iterable[Group] | Selection | Callable[[TokenMap], Tensor] | Tensor


def settled(where: Where, what: str) -> tuple[Group, ...] | Selection | Callable[[TokenMap], Tensor] | Tensor:
    """Groups as a tuple, the rest as it is.

    Raises:
        ValueError: it is nothing that names tokens.
    """
    if isinstance(where, Group):
        return (where,)
    if isinstance(where, Selection | Tensor) or callable(where):
        return where
    groups = tuple(where) if isinstance(where, Iterable) and not isinstance(where, str) else ()
    if not groups or not all(isinstance(group, Group) for group in groups):
        raise ValueError(
            f"{what}: expected groups (Group.IMAGE), a selection (OfClass(...)), a function of the TokenMap or a mask, got {where!r}"
        )
    return groups


def tokens_at(view: PromptView, where: object, what: str) -> Bool[Tensor, "b t"]:
    """The mask of what `settled` returned; padding is never in it.

    Raises:
        ValueError: a mask of another shape than the prompt.
    """
    tokens = view.tokens
    if isinstance(where, tuple):
        return tokens.of(*where)
    if isinstance(where, Selection):
        return chosen_in(view, where)
    mask = where(tokens) if callable(where) else where
    assert isinstance(mask, Tensor)
    if mask.shape != tokens.group.shape:
        raise ValueError(f"{what}: the mask has shape {tuple(mask.shape)}, the prompt {tuple(tokens.group.shape)}")
    return mask.to(tokens.group.device, torch.bool) & tokens.valid


def pictures_of(tokens: TokenMap) -> Int[Tensor, "b t"]:
    """Which picture of its row a token shows a part of, from 0; -1 for text, padding and newlines."""
    found = torch.full(tokens.group.shape, -1, dtype=torch.long)
    for row, spans in enumerate(tokens.images):
        for place, span in enumerate(spans):
            found[row, span.encoded()] = place
    return found.to(tokens.group.device)


def named(where: object) -> str:
    """For a `repr`."""
    if isinstance(where, tuple):
        return str([group.name for group in where])
    return repr(where) if isinstance(where, Selection) else "..."
