"""DART: keep a few pivot tokens of the pictures, and of the others those that duplicate the pivots least."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sparing.plan import FULL, LayerPlan, ModelShape, Policy, View
from sparing.policies.ranking import beyond_best, nothing_to_rank, order_of, share_of
from sparing.tokens import Group, TokenMap


class DART(Policy):
    """Choose pivots by the size of their keys, keep what is least like them, and drop the rest from `layer` on.

    Pivots are the tokens of the group, and of the text behind the first picture, whose keys in layer `layer - 1` have the largest
    L1 norms. Then each pivot in turn keeps its part of the budget: those of the tokens still open whose cosine to it is smallest.
    Cosines are between outputs of layer `layer - 1` behind the model's final norm. Text pivots take part, but are not counted. It
    needs no attention scores. The choice is made once, at prefill; positions are kept; rows without pictures are untouched.

    Args:
        layer: first layer without the dropped tokens.
        keep: share of the group's tokens that each row keeps, to the nearest; pivots are among them.
        image_pivots: pivots among the group's tokens.
        text_pivots: pivots among the text.
        groups: whose tokens are reduced; image tokens by default.

    Raises:
        ValueError: `layer` below 1 or not in the model, a share outside 0..1, or no pivots.

    Paper: DART (2502.11494): pivots by key norm, retained is what stays below a duplication threshold; layer 2, 4 + 4 pivots in the
        release's scripts, 128 of 576 tokens in its examples (77.8% reduced).
    Differs: in the release image pivots come on top of the number asked for, and each pivot's part of that is rounded down, so it
        keeps from three fewer to four more (132 for 128); here pivots are among `keep`, the first of them take one more, and it holds
        exactly. The release goes through its pivots in the order of a Python set; here image pivots come first, then text pivots,
        each with the largest key first. The release knows one picture in a row, of known place, in a batch of one. That the
        cosines are taken behind the final norm is the release's; the paper does not say where. Read in copies of the release.
    """

    causal = False
    looks_back = True

    def __init__(
        self,
        layer: int = 2,
        keep: float = 128 / 576,
        *,
        image_pivots: int = 4,
        text_pivots: int = 4,
        groups: Iterable[Group] = (Group.IMAGE,),
    ) -> None:
        if layer < 1:
            raise ValueError(f"DART(layer={layer}): pivots come from the layer before, so give layer >= 1")
        if not 0 <= keep <= 1:
            raise ValueError(f"DART(keep={keep}): the share to keep lies between 0 and 1")
        if min(image_pivots, text_pivots) < 0 or not image_pivots + text_pivots:
            raise ValueError(
                f"DART(image_pivots={image_pivots}, text_pivots={text_pivots}): give at least one pivot, and no fewer than 0"
            )
        self.layer, self.keep = layer, keep
        self.image_pivots, self.text_pivots, self.groups = image_pivots, text_pivots, tuple(groups)

    def validate(self, shape: ModelShape) -> None:
        """The first layer without the dropped tokens must exist."""
        if self.layer >= shape.depth:
            raise ValueError(f"DART(layer={self.layer}) would drop nothing: this model has layers 0..{shape.depth - 1}")

    def idle(self, tokens: TokenMap) -> bool:
        """The groups do not occur, or all of them are kept."""
        return self.keep == 1 or not tokens.has(*self.groups)

    def plan_feed(self, view: View) -> LayerPlan:
        """In the layer before: how large keys are."""
        if view.layer == self.layer - 1 and view.prefill and view.new.has(*self.groups):
            view.state["key_norms"] = view.keys().detach().float().abs().sum((1, 3))
        return FULL

    def plan_attend(self, view: View) -> LayerPlan:
        """In the layer: choose and drop."""
        if view.layer != self.layer or not view.prefill or "key_norms" not in view.state:
            return FULL
        alive, norms = view.alive(), view.state.pop("key_norms")
        candidates = view.tokens.of(*self.groups) & alive
        text = view.tokens.of(Group.TEXT) & alive & ~candidates
        states = torch.nn.functional.normalize(view.final_norm(view.residual.detach()).float(), dim=-1)
        b, t, width = states.shape
        view.spend(2 * b * t * width * (self.image_pivots + self.text_pivots))
        view.drop(self._beyond(states, norms, candidates, text))
        return FULL

    def _beyond(self, states: Tensor, norms: Tensor, candidates: Tensor, text: Tensor) -> Tensor:
        """The candidates that are neither pivots nor kept by one. states: `[b t d]`, of length 1; the rest `[b t]`."""
        budget = share_of(candidates, self.keep, nearest=True)
        theirs = (order_of(norms, text) < self.text_pivots) & text
        # Somebody must choose, also where there is no text.
        most = torch.where(theirs.any(1), self.image_pivots, max(self.image_pivots, 1)).minimum(budget)
        ours = (order_of(norms, candidates) < most[:, None]) & candidates
        number = ours.sum(1) + theirs.sum(1)
        left, open_ = budget - ours.sum(1), candidates & ~ours
        for place in range(self.image_pivots + self.text_pivots):
            # A row with fewer pivots skips the last places.
            pivot, exists = _nth(norms, ours, theirs, place)
            part = left // number.clamp(min=1) + (place < left % number.clamp(min=1)).long()
            cosine = (states * states.gather(1, pivot[:, None, None].expand(-1, 1, states.shape[2]))).sum(-1)
            open_ = beyond_best(-cosine, open_, torch.where(exists, part, 0))
        return open_

    def picture_shares(self, depth: int) -> tuple[float, ...] | None:
        """All, then `keep`; `None` where other groups are reduced."""
        if self.groups != (Group.IMAGE,):
            return None
        return (1.0,) * self.layer + (self.keep,) * (depth - self.layer)

    def conflict(self, other: Policy) -> str | None:
        """No keys to take pivots from."""
        return nothing_to_rank(other, self.layer - 1, planned=False)

    def __repr__(self) -> str:
        """As constructed."""
        pivots = f"image_pivots={self.image_pivots}, text_pivots={self.text_pivots}"
        return f"DART({self.layer}, {self.keep:g}, {pivots}, groups={[g.name for g in self.groups]})"


def _nth(norms: Tensor, ours: Tensor, theirs: Tensor, place: int) -> tuple[Tensor, Tensor]:
    """Index `[b]` of each row's pivot of that place (image pivots first, each kind by key norm), and whether there is one."""
    first = ours.sum(1, keepdim=True)
    rank = torch.where(ours, order_of(norms, ours), first + order_of(norms, theirs))
    at = (ours | theirs) & (rank == place)
    return at.int().argmax(1), at.any(1)
