"""FastV: drop the image tokens that received little attention in an early layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from sparing.plan import FULL, LayerPlan, ModelShape, Policy, View
from sparing.policies.ranking import beyond_best, last_of, nothing_to_rank, share_of
from sparing.tokens import Group, TokenMap


class FastV(Policy):
    """Rank a group's tokens by the attention they received in layer `layer - 1`; drop the low ones from `layer` on.

    The choice is made once, at prefill. A dropped token is neither computed nor read from `layer` on, by decoded tokens
    neither; in the layers before, its keys stay. Positions are kept. Text-only rows are untouched.

    Args:
        layer: first layer without the dropped tokens (the paper's K).
        keep: share of the tokens that each row keeps; `keep` times its own count, to the nearest (the paper's R is `1
            - keep`).
        rank_by: `last`: the attention of the prompt's last token, averaged over heads; `all`: what a token received
            from all later tokens, averaged over them and over heads.
        groups: what is ranked; image tokens by default.
        chunk: with `all`, how many queries are looked at together. Memory grows with `chunk * length`, never `length
            ** 2`.

    Raises:
        ValueError: `layer` below 1 (nothing has been attended to yet) or not in the model, a share outside 0..1, an
            unknown ranking.

    Paper: FastV (2403.06764), section 4.1: average attention received, K=2, R=50%; `rank_by="all"`.
    Differs: the release ranks by the last token alone (`rank_by="last"`, the default here), takes an absolute number
        of tokens between two fixed indices of the first row, and for `layer=0` drops at random, which is
        `DropTokens(groups=...)` here. Its cache variant renumbers the positions of decoded tokens; positions stay
        here, as in its mask variant. The paper does not say how "all other tokens" is normalised: here by the number
        of tokens that can see the ranked one.
    """

    causal = False
    looks_back = True

    def __init__(
        self,
        layer: int = 2,
        keep: float = 0.5,
        *,
        rank_by: Literal["last", "all"] = "last",
        groups: Iterable[Group] = (Group.IMAGE,),
        chunk: int = 64,
    ) -> None:
        if layer < 1:
            raise ValueError(
                f"FastV(layer={layer}): ranking looks at the layer before, so give layer >= 1 (before it use DropTokens)"
            )
        if not 0 <= keep <= 1:
            raise ValueError(f"FastV(keep={keep}): the share to keep lies between 0 and 1")
        if rank_by not in ("last", "all"):
            raise ValueError(f'FastV(rank_by={rank_by!r}): choose "last" (the release) or "all" (the paper)')
        if chunk < 1:
            raise ValueError(f"FastV(chunk={chunk}): give at least one query at a time")
        self.layer, self.keep, self.rank_by = layer, keep, rank_by
        self.groups, self.chunk = tuple(groups), chunk

    @classmethod
    def paper(cls) -> FastV:
        """As the paper describes it: K=2, half of the tokens, ranked by all later tokens."""
        return cls(2, 0.5, rank_by="all")

    @classmethod
    def release(cls) -> FastV:
        """As the released code does it: K=2, half of the tokens, ranked by the last token."""
        return cls(2, 0.5, rank_by="last")

    def validate(self, shape: ModelShape) -> None:
        """The first layer without the dropped tokens must exist."""
        if self.layer >= shape.depth:
            raise ValueError(
                f"FastV(layer={self.layer}) would drop nothing: this model has layers 0..{shape.depth - 1}"
            )

    def idle(self, tokens: TokenMap) -> bool:
        """The groups do not occur, or all of them are kept."""
        return self.keep == 1 or not tokens.has(*self.groups)

    def plan_feed(self, view: View) -> LayerPlan:
        """After the ranking layer's attention: choose and drop."""
        if view.layer != self.layer - 1 or not view.prefill or not view.new.has(*self.groups):
            return FULL
        alive = view.alive()
        candidates = view.tokens.of(*self.groups) & alive
        received = self._from_last(view, alive) if self.rank_by == "last" else self._from_all(view, alive)
        view.drop(beyond_best(received, candidates, share_of(candidates, self.keep, nearest=True)))
        return FULL

    def _from_last(self, view: View, alive: Tensor) -> Tensor:
        """`[b t]`, what the last token that is alive gives to each."""
        return view.scores(last_of(alive)).float().mean(1).squeeze(1)

    def _from_all(self, view: View, alive: Tensor) -> Tensor:
        """`[b t]`, the mean of what all later tokens that see it give to each, a few queries at a time."""
        b, t = alive.shape
        key, window = torch.arange(t, device=alive.device), view.shape.layers[view.layer].window
        received = later = torch.zeros(b, t, device=alive.device)
        for query in key.split(self.chunk):
            given = view.scores(query.expand(b, -1)).float().mean(1)
            see = query[:, None] > key
            if window is not None:
                see = see & (query[:, None] - key < window)
            counts = alive[:, query, None] & see
            received, later = received + (given * counts).sum(1), later + counts.sum(1)
        return received / later.clamp(min=1)

    def picture_shares(self, depth: int) -> tuple[float, ...] | None:
        """All, then `keep`; `None` where other groups are ranked."""
        if self.groups != (Group.IMAGE,):
            return None
        return (1.0,) * self.layer + (self.keep,) * (depth - self.layer)

    def conflict(self, other: Policy) -> str | None:
        """Nothing to rank in the ranking layer."""
        return nothing_to_rank(other, self.layer - 1, planned=True)

    def __repr__(self) -> str:
        """As constructed."""
        return f"FastV({self.layer}, {self.keep:g}, rank_by={self.rank_by!r}, groups={[g.name for g in self.groups]})"
