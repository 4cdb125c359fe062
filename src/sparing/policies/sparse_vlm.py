"""SparseVLM: text tokens that matter rate the picture's, layer by layer; what is removed is folded into a few tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from sparing.plan import FULL, LayerPlan, ModelShape, Policy, PromptView, View
from sparing.plan.policy import check_layers
from sparing.policies.clusters import density_peaks
from sparing.policies.ranking import beyond_best, last_of, nothing_to_rank, share_of
from sparing.tokens import Group, TokenMap


class SparseVLM(Policy):
    """At each stage layer, keep the picture tokens to which the raters attend most; merge some of the others; drop the rest.

    Raters are the text tokens (behind the first picture) that match the picture more than the mean does: the softmax over the text
    of `picture @ text`, of embeddings, averaged over the picture's tokens. At a stage a picture token's score is the attention that
    it receives from the raters, averaged over them and over heads. Kept tokens go on from the next layer. Of the others the best
    `recycle` are clustered by what the stage layer gave for them (`density_peaks`); each cluster becomes one token, in the place of
    its centre. All of a row's pictures are one. The choice is made once, at prefill; positions are kept; rows without pictures are
    untouched.

    Args:
        layers: the stage layers, ascending.
        keep: share of a row's picture tokens that each stage leaves, of their number at the first one; recycled tokens come on top.
            One number a stage.
        adaptive: instead of `keep`, the factor in `removed = adaptive * (tokens - rank)`: the rank of the raters' attention to the
            tokens says how many are needed.
        recycle: share of the removed tokens that are merged, and one; 0 merges none.
        clusters: share of those that remain as tokens, and one.
        merge: what a cluster's token is: the `mean` of its members (release) or their `sum` (paper).
        chunk: how many raters are looked at together.

    Raises:
        ValueError: layers that are not ascending, not in the model, or the last one; shares outside 0..1, rising, or not one a
            stage; an unknown merge.

    Paper: SparseVLM (2410.04417), sections on text raters, the sparsification level and token recycling.
    Differs: the release has fixed numbers at layers 2, 6 and 15 (300, 200 and 110 of 576 for 192 tokens a layer on average) and no
        ranks; so `keep` is the default here, and `adaptive` is the paper's rule, whose factor the paper does not fix for all models.
        The release averages a cluster where the paper sums; it adds noise to break ties of density. It puts merged tokens behind
        the kept ones and renumbers positions; here they stand where their centre was. It takes all that follows the picture for
        text, in a batch of one. If no token is above the mean, all text rates; without text, the last token does. Not here:
        SparseVLM+ (position correction, choice of heads, no recycling).
    """

    causal = False
    looks_back = True

    def __init__(
        self,
        layers: Iterable[int] = (2, 6, 15),
        keep: Sequence[float] = (300 / 576, 200 / 576, 110 / 576),
        *,
        adaptive: float | None = None,
        recycle: float = 0.3,
        clusters: float = 0.1,
        merge: Literal["mean", "sum"] = "mean",
        chunk: int = 64,
    ) -> None:
        self.layers, self.keep = tuple(layers), tuple(keep)
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"SparseVLM(layers={list(self.layers)}): name at least one layer, each once, ascending")
        if adaptive is None and len(self.keep) != len(self.layers):
            raise ValueError(
                f"SparseVLM(keep={list(self.keep)}) has {len(self.keep)} shares for {len(self.layers)} stages: give one a stage"
            )
        if not all(0 <= share <= 1 for share in self.keep) or list(self.keep) != sorted(self.keep, reverse=True):
            raise ValueError(
                f"SparseVLM(keep={list(self.keep)}): shares of the first stage's tokens lie between 0 and 1 and do not rise"
            )
        if not (0 <= recycle <= 1 and 0 <= clusters <= 1) or (adaptive is not None and adaptive < 0):
            raise ValueError(
                f"SparseVLM(recycle={recycle}, clusters={clusters}, adaptive={adaptive}): shares lie between 0 and 1, "
                "the factor is not negative"
            )
        if merge not in ("mean", "sum"):
            raise ValueError(f'SparseVLM(merge={merge!r}): choose "mean" (the release) or "sum" (the paper)')
        if chunk < 1:
            raise ValueError(f"SparseVLM(chunk={chunk}): give at least one rater at a time")
        self.adaptive, self.recycle, self.clusters, self.merge, self.chunk = adaptive, recycle, clusters, merge, chunk

    @classmethod
    def paper(cls, layers: Iterable[int] = (2, 6, 15), adaptive: float = 1.0) -> SparseVLM:
        """The paper's rule: as many tokens as ranks (times a factor), clusters summed."""
        return cls(layers, (), adaptive=adaptive, merge="sum")

    @classmethod
    def release(cls) -> SparseVLM:
        """The released code's numbers for 192 of 576 tokens, clusters averaged."""
        return cls()

    def validate(self, shape: ModelShape) -> None:
        """Every stage needs a layer behind it."""
        check_layers(self.layers, shape, "SparseVLM(layers=...)")
        if self.layers[-1] == shape.depth - 1:
            raise ValueError(
                f"SparseVLM(layers={list(self.layers)}): layer {shape.depth - 1} is the last one, and no layer would have fewer "
                "tokens; name an earlier one"
            )

    def idle(self, tokens: TokenMap) -> bool:
        """There are no pictures, or nothing is removed."""
        return not tokens.has(Group.IMAGE) or (self.adaptive is None and all(share == 1 for share in self.keep))

    def start(self, view: PromptView) -> None:
        """Choose the raters."""
        tokens, embeds = view.tokens, view.embeds.detach().float()
        picture, text = tokens.of(Group.IMAGE), tokens.of(Group.TEXT)
        raters = torch.zeros_like(text)
        for row in range(tokens.batch):
            seen, words = embeds[row, picture[row]], embeds[row, text[row]]
            if not len(seen) or not len(words):
                continue
            view.spend(2 * seen.numel() * len(words))
            match = (seen @ words.T).softmax(1).mean(0)
            raters[row, text[row]] = (match > match.mean()) | (match.max() <= match.mean())
        last = torch.zeros_like(raters).scatter(1, last_of(tokens.valid), True)
        view.state["raters"] = torch.where(raters.any(1, keepdim=True), raters, last)

    def plan_feed(self, view: View) -> LayerPlan:
        """In a stage layer: rank."""
        if view.layer not in self.layers or not view.prefill or not view.new.has(Group.IMAGE):
            return FULL
        candidates = view.tokens.of(Group.IMAGE) & view.alive()
        first = view.state.setdefault("first", candidates)
        scores, rank = self._rate(view, candidates)
        if rank is None or self.adaptive is None:
            count = share_of(first, self.keep[self.layers.index(view.layer)], nearest=True)
        else:
            number = candidates.sum(1)
            count = number - ((number - rank).clamp(min=0) * self.adaptive).floor().long().clamp(max=number)
        gone = beyond_best(scores, candidates, count)
        view.state["gone"] = gone
        merged = (share_of(gone, self.recycle) + 1) * bool(self.recycle)
        view.state["merged"] = gone & ~beyond_best(scores, gone, merged)
        return FULL

    def _rate(self, view: View, candidates: Tensor) -> tuple[Tensor, Tensor | None]:
        """`[b t]`, what a rater gives to each token on average; and `[b]`, the rank of what raters give, where that is asked for."""
        raters = view.state["raters"] & view.alive()
        number = raters.sum(1)
        order = raters.int().argsort(dim=1, descending=True, stable=True)[:, : int(number.max())]
        given = [
            view.scores(part).float().mean(1) * raters.gather(1, part)[..., None]
            for part in order.split(self.chunk, dim=1)
        ]
        received = torch.stack([part.sum(1) for part in given]).sum(0) / number.clamp(min=1)[:, None]
        if self.adaptive is None:
            return received, None
        table = torch.cat(given, dim=1) * candidates[:, None]
        # What counts as zero follows each row's own sizes, not those of the batch.
        sizes = torch.maximum(number, candidates.sum(1)).clamp(min=1)
        return received, torch.linalg.matrix_rank(table, rtol=sizes * torch.finfo(table.dtype).eps)

    def plan_attend(self, view: View) -> LayerPlan:
        """In the layer behind a stage: merge and drop."""
        if "gone" not in view.state:
            return FULL
        gone, merged = view.state.pop("gone"), view.state.pop("merged")
        residual = view.residual
        where = torch.zeros_like(gone)
        states = []
        for row in range(len(gone)):
            index = merged[row].nonzero().flatten()
            if not len(index):
                continue
            members = residual[row, index]
            number = min(int(len(index) * self.clusters + 1e-9) + 1, len(index))
            centres, cluster = density_peaks(members.detach(), number)
            view.spend(2 * len(index) * members.numel())
            one_hot = torch.nn.functional.one_hot(cluster, number).to(members.dtype)
            folded = one_hot.T @ members
            if self.merge == "mean":
                folded = folded / one_hot.sum(0)[:, None]
            ordered = index[centres].sort()
            where[row, ordered.values] = True
            states.append(folded[ordered.indices])
        view.drop(gone & ~where)
        if not states:
            return FULL
        new = torch.cat(states)
        at = where.nonzero(as_tuple=True)
        return LayerPlan(rewrites=lambda x: x.index_put(at, new.to(x.dtype)))

    def picture_shares(self, depth: int) -> tuple[float, ...] | None:
        """What the stages so far leave and what they recycle, but for the one token at least; `None` where ranks decide."""
        if self.adaptive is not None:
            return None
        shares, left, alive = [1.0] * depth, iter(self.keep), 1.0
        for layer in self.layers:
            share = next(left)
            alive = share + max(alive - share, 0.0) * self.recycle * self.clusters
            shares[layer + 1 :] = [alive] * (depth - layer - 1)
        return tuple(shares)

    def conflict(self, other: Policy) -> str | None:
        """Nothing to rank at a stage."""
        reasons = (nothing_to_rank(other, layer, planned=True) for layer in self.layers)
        return next((reason for reason in reasons if reason), None)

    def __repr__(self) -> str:
        """As constructed."""
        how = (
            f"adaptive={self.adaptive:g}"
            if self.adaptive is not None
            else f"[{', '.join(f'{share:g}' for share in self.keep)}]"
        )
        return f"SparseVLM({list(self.layers)}, {how}, recycle={self.recycle:g}, clusters={self.clusters:g}, merge={self.merge!r})"
