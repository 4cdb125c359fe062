"""How tokens are ranked and the best of each row kept: shared by the methods that drop tokens inside the decoder."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from sparing.plan import Policy


def last_of(mask: Bool[Tensor, "b t"]) -> Tensor:
    """Index `[b 1]` of the last `True` of each row, under left and right padding alike."""
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(1, keepdim=True)


def order_of(scores: Float[Tensor, "b t"], candidates: Bool[Tensor, "b t"]) -> Tensor:
    """`[b t]`, each candidate's place in its row, the highest score first; equal scores go to the earlier token."""
    order = scores.masked_fill(~candidates, float("-inf")).argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1)


def beyond_best(scores: Float[Tensor, "b t"], candidates: Bool[Tensor, "b t"], count: Tensor) -> Bool[Tensor, "b t"]:
    """The candidates that are not among the best `count` `[b]` of their row."""
    return candidates & (order_of(scores, candidates) >= count.unsqueeze(1))


def share_of(mask: Bool[Tensor, "b t"], share: float, *, nearest: bool = False) -> Tensor:
    """`[b]`, that share of the number of `True` tokens of each row, rounded down or (halves up) to the nearest."""
    # A share such as 0.3 is not exact in binary: 0.3 * 10 must not fall to 2.
    return (mask.sum(1).double() * share + (0.5 if nearest else 0.0) + 1e-9).floor().long()


def nothing_to_rank(other: Policy, layer: int, *, planned: bool) -> str | None:
    """Why a ranking by attention in `layer` would find nothing under `other`; `None` if it would.

    With `planned` the ranking sees what that layer's plan lets be read, without it the attention that would be.
    """
    never, unread = getattr(other, "never", None), getattr(other, "unread", None)
    if never is not None and never(layer):
        return f"it ranks tokens in layer {layer}, where they are away; rank in a layer that computes them"
    if planned and unread is not None and unread(layer):
        return (
            f"it ranks tokens by attention in layer {layer}, where they are not read; rank in a layer that reads them"
        )
    return None
