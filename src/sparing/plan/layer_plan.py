"""`LayerPlan`: what one layer computes, and how plans combine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

Mask = Tensor | bool
Sees = Callable[[Tensor, Tensor], Tensor]
Rewrites = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class LayerPlan:
    """What one layer computes, for the tokens of one forward pass. `True` and `False` stand for every token.

    Attributes:
        attend: `[b t]`, whether this token's attention branch is computed and added to the residual.
        feed: `[b t]`, the same for the MLP branch.
        read: `[b t]`, whether this token's key and value can be read in this layer, by later tokens too. Given as
            `[b past+t]` it speaks of cached tokens as well: `False` frees them, and `True` for a freed one is an error.
            A token that does not attend keeps its residual; its key and value, if read, come from that residual.
        attend_weight: `[b t]`, a real weight on the attention branch's output. It must be zero where `attend` is `False`.
        feed_weight: `[b t]`, the same for the MLP branch.
        block_weight: `[b t]`, a real weight on what the whole layer adds to the residual, both branches together. Given before
            attention; the MLP still reads the unweighted sum with attention.
        sees: a mask on top of causality and padding. Called with query indices `[b q 1]` and key indices `[b 1 k]`, both in
            original order, it returns what broadcasts to `[b q k]`: `True` where the query may read the key.
        zeroes: an ablation, not a plan: `True` where an attention weight is set to zero after the softmax, the others staying as
            they are. Called as `sees` is; `dense` only.
        rewrites: what enters the layer, `[b t d]`, is replaced by this function of it, which writes to nothing that it is given:
            how tokens are merged between layers. Given before attention; `plan_attend` still sees what there was.
        capacity: a promise that no row has more than this many `True` tokens in `attend` and `feed`, where those are
            tensors. It saves the fast executor its one wait for the device. A false promise is an error on the CPU; on an
            accelerator, where checking would mean waiting, rows beyond it are left out.

    A key that is not readable is hidden before the softmax; a query with no readable key has a zero attention result before the
    output projection.
    """

    attend: Mask = True
    feed: Mask = True
    read: Mask = True
    attend_weight: Tensor | None = None
    feed_weight: Tensor | None = None
    block_weight: Tensor | None = None
    sees: Sees | None = None
    zeroes: Sees | None = None
    rewrites: Rewrites | None = None
    capacity: int | None = None

    @property
    def full(self) -> bool:
        """Whether this plan asks for nothing to be left out (decided without looking into tensors)."""
        return (
            self.attend is True
            and self.feed is True
            and self.read is True
            and self.attend_weight is None
            and self.feed_weight is None
            and self.block_weight is None
            and self.sees is None
            and self.zeroes is None
            and self.rewrites is None
        )

    def __and__(self, other: LayerPlan) -> LayerPlan:
        """Compute only what both plans ask for; weights multiply, `sees` masks intersect.

        Raises:
            ValueError: the plans speak of different numbers of tokens.
        """
        if self.full:
            return other
        if other.full:
            return self
        return LayerPlan(
            attend=both(self.attend, other.attend, "attend"),
            feed=both(self.feed, other.feed, "feed"),
            read=both_reads(self.read, other.read),
            attend_weight=_weights(self.attend_weight, self.attend, other.attend_weight, other.attend),
            feed_weight=_weights(self.feed_weight, self.feed, other.feed_weight, other.feed),
            block_weight=_product(self.block_weight, other.block_weight),
            sees=_both_see(self.sees, other.sees),
            zeroes=_either_zeroes(self.zeroes, other.zeroes),
            rewrites=_one_after_another(self.rewrites, other.rewrites),
            capacity=_capacity(self.capacity, other.capacity),
        )

    def feeding(self, other: LayerPlan) -> LayerPlan:
        """This plan with the MLP part of `other` (what `Policy.plan_feed` returned) combined into it."""
        if other.feed is True and other.feed_weight is None:
            return self
        return dataclasses.replace(
            self,
            feed=both(self.feed, other.feed, "feed"),
            feed_weight=_weights(self.feed_weight, self.feed, other.feed_weight, other.feed),
            capacity=_capacity(self.capacity, other.capacity),
        )


def both(a: Mask, b: Mask, name: str = "mask") -> Mask:
    """Intersect two masks, keeping tensors' identity where nothing changes (executors memoise by identity)."""
    if a is True or a is b:
        return b
    if b is True:
        return a
    if a is False or b is False:
        return False
    assert isinstance(a, Tensor)
    assert isinstance(b, Tensor)
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"two plans disagree on `{name}`: one speaks of {a.shape[-1]} tokens, the other of {b.shape[-1]}; "
            "give one entry for each new token"
        )
    return a & b


def both_reads(a: Mask, b: Mask) -> Mask:
    """Intersect two `read` masks, where one may speak of the new tokens alone and the other of cached ones too."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape[-1] != b.shape[-1]:
        short, long = (a, b) if a.shape[-1] < b.shape[-1] else (b, a)
        past = long.shape[-1] - short.shape[-1]
        return torch.cat([long[:, :past], long[:, past:] & short], dim=-1)
    return both(a, b, "read")


def _weights(wa: Tensor | None, ma: Mask, wb: Tensor | None, mb: Mask) -> Tensor | None:
    """Multiply two branch weights; each is also zeroed where the other plan leaves the branch out."""
    if wa is None and wb is None:
        return None
    weight = _product(wa, wb)
    assert weight is not None
    # A weight already vanishes where its own plan says no: only the other plan's mask is missing.
    for own, mask in ((wa, mb), (wb, ma)):
        if own is not None and mask is not True:
            weight = weight * (mask.to(weight.dtype) if isinstance(mask, Tensor) else 0.0)
    return weight


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a * b


def _both_see(a: Sees | None, b: Sees | None) -> Sees | None:
    if a is None or b is None:
        return a or b
    return lambda query, key: a(query, key) & b(query, key)


def _either_zeroes(a: Sees | None, b: Sees | None) -> Sees | None:
    if a is None or b is None:
        return a or b
    return lambda query, key: a(query, key) | b(query, key)


def _one_after_another(a: Rewrites | None, b: Rewrites | None) -> Rewrites | None:
    if a is None or b is None:
        return a or b
    return lambda states: b(a(states))


def _capacity(a: int | None, b: int | None) -> int | None:
    """The promise that still holds. One plan's tensors may be bound by its own promise alone, hence the larger."""
    return max(a, b) if a is not None and b is not None else None


FULL = LayerPlan()
NOTHING = LayerPlan(attend=False, feed=False, read=False)
