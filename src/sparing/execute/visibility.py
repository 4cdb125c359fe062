"""Which keys a query may read, and what becomes of its scores before the softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.plan.layer_plan import Sees


def within(window: int, sees: Sees | None) -> Sees:
    """Less than `window` tokens back, counted as transformers does: by original index, padding included."""
    if sees is None:
        return lambda query, key: key > query - window
    return lambda query, key: (key > query - window) & sees(query, key)


def capped(scores: Tensor, cap: float | None) -> Tensor:
    """Attention scores under a soft cap."""
    return scores if cap is None else cap * torch.tanh(scores / cap)


def visible(query: Tensor, key: Tensor, sees: Sees | None, *, certain: bool = False) -> tuple[Tensor, Tensor | None]:
    """See `Pass.visible`."""
    q, k = query.unsqueeze(2), key.unsqueeze(1)
    may = (k <= q) & (k >= 0)
    if sees is not None:
        may = may & sees(q, k)
    if certain:
        return may, None
    some = may.any(-1, keepdim=True)
    return may | ~some, some
