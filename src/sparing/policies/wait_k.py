"""The wait-k mask: a target word sees the first words of the source alone, and the source never sees the target."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from sparing.plan import FULL, LayerPlan, ModelShape, Policy, View
from sparing.plan.layer_plan import Sees
from sparing.tokens import Group, TokenMap


class WaitKMask(Policy):
    """Hide from each target token the source that would not have been read yet.

    Segments number the words from 0 in both groups: source segment 0 is the prompt if it belongs to the source,
    target segment 0 the header. A token that predicts a token of target segment i sees the source segments before k +
    i; the last target token of a map counts as predicting its own segment. Source tokens see no target token. Tokens
    of other groups are seen, and see, as causality has it. Nothing is skipped: this plan is about who reads whom.

    Args:
        k: how many source segments are read before target segment 0.
        tokens: the map of the whole stream, where it is known beyond the prompt (target words that are fed one by one
            through the cache). Without it, and beyond its end, a decoded token sees all of the source that has come.
            Its rows do not follow beams; give one row for all of them then.

    Raises:
        ValueError: k below 1; (on a prompt) source and target without segments, or a map for another batch.

    Paper: group position encoding (2505.16983): target segment i sees the first `min(k + i, n)` source segments; its
        release shifts this block up by one row, so that the token that predicts a word already has that word's
        source.
    Differs: the release's shift also moves the first target row's source over the last source row; source rows stay
        causal here. Its start-up at inference sees one source segment more than in training; that mismatch is not
        offered.
    """

    def __init__(self, k: int, *, tokens: TokenMap | None = None) -> None:
        if k < 1:
            raise ValueError(f"WaitKMask(k={k}): at least one source segment must be read first, so give k >= 1")
        self.k, self.tokens = k, tokens

    def validate(self, shape: ModelShape) -> None:
        """Applies to every model."""
        return

    def idle(self, tokens: TokenMap) -> bool:
        """Source and target do not both occur."""
        return self.tokens is None and not (tokens.has(Group.SOURCE) and tokens.has(Group.TARGET))

    def plan_attend(self, view: View) -> LayerPlan:
        """The same mask in every layer."""
        found = view.state.get("sees")
        if found is None or found[0] is not view.tokens:
            found = view.state["sees"] = (view.tokens, self._sees(view.tokens))
        return LayerPlan(sees=found[1]) if found[1] is not None else FULL

    def _sees(self, seen: TokenMap) -> Sees | None:
        """The mask function over original indices."""
        tokens = seen if self.tokens is None else self.tokens
        if not (tokens.has(Group.SOURCE) and tokens.has(Group.TARGET)):
            return None
        if tokens.segment is None:
            raise ValueError("WaitKMask needs the segment of every source and target token: give TokenMap.segment")
        if tokens.batch not in (1, seen.batch):
            raise ValueError(
                f"WaitKMask(tokens=...) describes {tokens.batch} rows, this batch has {seen.batch}, "
                "and beams cannot reorder it: give a map of one row, or of this batch"
            )
        never = torch.iinfo(torch.long).max
        source = torch.where(tokens.group == Group.SOURCE, tokens.segment.long(), -1)
        budget = torch.where(tokens.group == Group.TARGET, self.k + predicted_segment(tokens), never)
        target = tokens.group == Group.TARGET
        is_source = tokens.group == Group.SOURCE

        def sees(query: Tensor, key: Tensor) -> Tensor:
            early = _at(source, key, -1) < _at(budget, query, never)
            upstream = _at(is_source, query, False) & _at(target, key, False)
            return early & ~upstream

        return sees

    def __repr__(self) -> str:
        """As constructed."""
        return f"WaitKMask({self.k})" if self.tokens is None else f"WaitKMask({self.k}, tokens=...)"


def predicted_segment(tokens: TokenMap) -> Int[Tensor, "b t"]:
    """The segment of the target token that follows each token; its own for the last one. Segments must not decrease."""
    assert tokens.segment is not None
    target = tokens.group == Group.TARGET
    last, own = torch.iinfo(torch.long).max, tokens.segment.long()
    segment = torch.where(target, own, last)
    following = torch.cat([segment[:, 1:], torch.full_like(segment[:, :1], last)], dim=1)
    nearest = following.flip(1).cummin(1).values.flip(1)
    return torch.where(nearest == last, own, nearest)


def _at(table: Tensor, index: Tensor, beyond: int | bool) -> Tensor:
    """Look up original indices of any shape `[b ...]` in a `[b T]` table; `beyond` outside of it."""
    index = index.to(table.device)
    b = max(index.shape[0], table.shape[0])
    flat = index.expand(b, *index.shape[1:]).reshape(b, -1)
    inside = (flat >= 0) & (flat < table.shape[1])
    found = table.expand(b, -1).gather(1, flat.clamp(0, table.shape[1] - 1))
    return torch.where(inside, found, beyond).view(b, *index.shape[1:])
