"""PyramidDrop: drop image tokens in stages, each time those that the instruction's last token looks at least."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from sparing.plan import FULL, LayerPlan, ModelShape, Policy, View
from sparing.plan.policy import check_layers
from sparing.policies.ranking import beyond_best, last_of, nothing_to_rank, share_of
from sparing.tokens import Group, TokenMap


class PyramidDrop(Policy):
    """At each stage layer, rank the tokens still alive by the last prompt token's attention and drop the low ones.

    The ranking uses the stage layer's own norm and projections on its input, before its attention runs, and the drop
    takes effect in that same layer. After stage s a row keeps `floor(count * keep_1 * ... * keep_s)` of the tokens
    that it had at the first stage. The choice is made once, at prefill. Positions are kept. Text-only rows are
    untouched.

    Args:
        layers: the stage layers, ascending.
        keep: share that survives each stage; one number for all stages, or one a stage.
        groups: what is ranked; image tokens by default.

    Raises:
        ValueError: layers that are not ascending or not in the model, a share outside 0..1, or not one share a stage.

    Paper: PyramidDrop (2410.17247): four stages of equal length, ratio 0.5.
    Differs: the release renumbers positions after every stage, and keeps them here; it handles one picture a row and
        right padding alone; in training it ranks by the tokens before each answer, here always by the last token of
        the prompt.
    """

    causal = False

    def __init__(
        self,
        layers: Iterable[int] = (8, 16, 24),
        keep: float | Sequence[float] = 0.5,
        *,
        groups: Iterable[Group] = (Group.IMAGE,),
    ) -> None:
        self.layers = tuple(layers)
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"PyramidDrop(layers={list(self.layers)}): name at least one layer, each once, ascending")
        self.keep = (float(keep),) * len(self.layers) if isinstance(keep, int | float) else tuple(keep)
        if len(self.keep) != len(self.layers):
            raise ValueError(
                f"PyramidDrop(keep={list(self.keep)}) has {len(self.keep)} shares for {len(self.layers)} stages: "
                "give one a stage"
            )
        if not all(0 <= share <= 1 for share in self.keep):
            raise ValueError(f"PyramidDrop(keep={list(self.keep)}): shares to keep lie between 0 and 1")
        self.groups = tuple(groups)

    def validate(self, shape: ModelShape) -> None:
        """Every stage layer must exist."""
        check_layers(self.layers, shape, "PyramidDrop(layers=...)")

    def idle(self, tokens: TokenMap) -> bool:
        """The groups do not occur, or nothing is dropped."""
        return all(share == 1 for share in self.keep) or not tokens.has(*self.groups)

    def plan_attend(self, view: View) -> LayerPlan:
        """At a stage: rank, and drop from this layer on."""
        if view.layer not in self.layers or not view.prefill or not view.new.has(*self.groups):
            return FULL
        alive = view.alive()
        candidates = view.tokens.of(*self.groups) & alive
        first = view.state.setdefault("first", candidates)
        share = 1.0
        for left in self.keep[: self.layers.index(view.layer) + 1]:
            share *= left
        received = view.scores(last_of(alive)).float().mean(1).squeeze(1)
        view.drop(beyond_best(received, candidates, share_of(first, share)))
        return FULL

    def picture_shares(self, depth: int) -> tuple[float, ...] | None:
        """What the stages so far leave; `None` where other groups are ranked."""
        if self.groups != (Group.IMAGE,):
            return None
        passed = [[share for at, share in zip(self.layers, self.keep, strict=True) if at <= i] for i in range(depth)]
        return tuple(math.prod(shares) for shares in passed)

    def conflict(self, other: Policy) -> str | None:
        """Nothing to rank at a stage."""
        reasons = (nothing_to_rank(other, layer, planned=False) for layer in self.layers)
        return next((reason for reason in reasons if reason), None)

    def __repr__(self) -> str:
        """As constructed."""
        keep = ", ".join(f"{share:g}" for share in self.keep)
        return f"PyramidDrop({list(self.layers)}, [{keep}], groups={[g.name for g in self.groups]})"
