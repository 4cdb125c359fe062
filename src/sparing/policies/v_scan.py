"""VScan: two looks into the vision encoder choose and merge picture tokens; a middle layer of the decoder drops some more."""

from __future__ import annotations

import math

import torch
from jaxtyping import Int
from torch import Tensor

from sparing.plan import FULL, LayerPlan, ModelShape, Policy, PromptView, View
from sparing.plan.policy import check_layers
from sparing.policies.pictures import PicturePruning, others_than, rows_at
from sparing.policies.ranking import beyond_best, last_of, nothing_to_rank, share_of
from sparing.tokens import Group, ImageSpan, TokenMap


class VScan(PicturePruning):
    """A local and a global scan keep tokens before the first layer and merge the others into them; then one layer ranks by attention.

    Local scan: of each window of the picture's grid the tokens that receive most attention in a shallow layer of the encoder (the
    best of every window first, then the second best). Global scan: of the others those that receive most in the layer whose output
    is projected. Attention is the class token's; without one, that of all patches on average. Each token that is left out goes to
    the kept one most like it (cosine, behind the projector), which becomes the mean of itself and what went to it. In the decoder,
    before `layer`, the last prompt token's attention keeps `then` of a row's tokens.

    Args:
        keep: share of each picture's tokens that stays before the first layer.
        layer: the decoder layer that drops more; `None` for no second stage.
        then: share of a row's tokens that stay from `layer` on, to the nearest.
        local: share of the kept ones that the local scan chooses, rounded down.
        window: side of a window, in tokens; windows at the edges are smaller where it does not fit.
        local_layer: the shallow layer: its number, or a share of the encoder's depth.
        encoder_layer: the deep one, if not that whose output is projected.

    Raises:
        ValueError: a share of tokens that is not above 0 and at most 1, another share outside 0..1, no window, or (when applied) a
            layer that does not exist.

    Paper: VScan (2505.22654): on LLaVA-1.5-7B 96 of 576 tokens, 32 from layer 16 on (64 on average); windows of 6 tokens a side and
        layer 5 of 24. On Qwen2.5-VL the release has windows of 4, layer 7 of 32 (the first that sees the whole picture) and the
        last, and the second stage at layer 14 of 28.
    Differs: where the local budget is no multiple of the number of windows the release leaves the rest out (below one token a window
        all of it), here windows with the strongest next token get one more, so `keep` holds. The release is for grids of 24 x 24 on
        LLaVA and renumbers positions after the second stage. On Qwen2.5-VL, with one picture, its local scan is another: the best of
        the whole picture, while their window has less than its even part (rounded up), and what lies beyond the last whole window
        counts to it; and its second stage ranks by queries and keys before rotation. Both are here as on LLaVA. Tiles of LLaVA-NeXT
        keep the same number each there, here each picture keeps its share; an overview in front of tiles has windows of its own.
    """

    def __init__(
        self,
        keep: float = 96 / 576,
        layer: int | None = 16,
        then: float = 1 / 3,
        *,
        local: float = 0.5,
        window: int = 6,
        local_layer: int | float = 0.25,
        encoder_layer: int | float | None = None,
    ) -> None:
        super().__init__(keep)
        if not (0 <= then <= 1 and 0 <= local <= 1):
            raise ValueError(f"VScan(then={then}, local={local}): shares lie between 0 and 1")
        if window < 1:
            raise ValueError(f"VScan(window={window}): a window has at least one token a side")
        if layer is not None and layer < 1:
            raise ValueError(
                f"VScan(layer={layer}): the second stage comes after the first layer, so give layer >= 1, or None"
            )
        self.layer, self.then, self.local, self.window = layer, then, local, window
        self.local_layer, self.encoder_layer = local_layer, encoder_layer
        self.looks_at_encoder = (local_layer, encoder_layer)

    def validate(self, shape: ModelShape) -> None:
        """The layer of the second stage must exist."""
        check_layers([] if self.layer is None else [self.layer], shape, "VScan(layer=...)")

    def idle(self, tokens: TokenMap) -> bool:
        """There are no pictures, or nothing is dropped."""
        return not tokens.has(Group.IMAGE) or (self.keep == 1 and (self.layer is None or self.then == 1))

    def choose(
        self, view: PromptView, layout: ImageSpan, rows: Int[Tensor, " p"], index: Int[Tensor, "p n"], count: int
    ) -> Int[Tensor, "p count"]:
        """Both scans; the others are merged into what they chose."""
        shallow, deep = (
            rows_at(view.encoder_attention(at), rows, index) for at in (self.local_layer, self.encoder_layer)
        )
        number = int(count * self.local + 1e-9)
        windows = windows_of(layout, self.window).to(index.device)
        near = _best_of_windows(shallow, windows)[:, :number]
        far = deep.scatter(1, near, float("-inf")).argsort(dim=1, descending=True, stable=True)[:, : count - number]
        kept = torch.cat([near, far], dim=1)
        if count < index.shape[1]:
            self._merge(view, rows, index.gather(1, kept), index.gather(1, others_than(kept, index.shape[1])))
        return kept

    @staticmethod
    def _merge(view: PromptView, rows: Tensor, kept: Tensor, others: Tensor) -> None:
        """Average what is left out `[p m]` into what it is most like, `[p c]` (original indices)."""
        ours, theirs = (rows_at(view.embeds, rows, at) for at in (kept, others))
        unit = [torch.nn.functional.normalize(x.detach().float(), dim=-1) for x in (theirs, ours)]
        view.spend(2 * unit[0].numel() * kept.shape[1])
        into = torch.nn.functional.one_hot((unit[0] @ unit[1].mT).argmax(2), kept.shape[1]).to(ours.dtype)
        merged = (ours + into.mT @ theirs) / (1 + into.sum(1)).unsqueeze(-1)
        view.embeds = view.embeds.index_put((rows[:, None], kept), merged)

    def plan_attend(self, view: View) -> LayerPlan:
        """The second stage: rank, and drop from this layer on."""
        if view.layer != self.layer or not view.prefill or not view.new.has(Group.IMAGE):
            return FULL
        alive = view.alive()
        candidates = view.tokens.of(Group.IMAGE) & alive
        received = view.scores(last_of(alive)).float().mean(1).squeeze(1)
        view.drop(beyond_best(received, candidates, share_of(candidates, self.then, nearest=True)))
        return FULL

    def picture_shares(self, depth: int) -> tuple[float, ...]:
        """`keep`, and from the second stage on `then` of it."""
        second = depth if self.layer is None else self.layer
        return (self.keep,) * second + (self.keep * self.then,) * (depth - second)

    def conflict(self, other: Policy) -> str | None:
        """Nothing to rank in the second stage."""
        return None if self.layer is None else nothing_to_rank(other, self.layer, planned=False)

    def __repr__(self) -> str:
        """As constructed."""
        return f"VScan({self.keep:g}, {self.layer}, {self.then:g}, local={self.local:g}, window={self.window})"


def windows_of(layout: ImageSpan, side: int) -> Int[Tensor, " n"]:
    """The window that each token of a picture belongs to; what lies before the grid (an overview) has windows of its own."""
    front = math.isqrt(layout.offset)
    grids = [(front, front)] if front * front == layout.offset else [(1, layout.offset)]
    parts, first = [], 0
    for height, width in (*grids, layout.grid):
        across = -(-width // side)
        part = torch.arange(height)[:, None] // side * across + torch.arange(width) // side
        parts.append(first + part.flatten())
        first += -(-height // side) * across
    return torch.cat(parts)


def _best_of_windows(scores: Tensor, windows: Tensor) -> Tensor:
    """`[p n]`, places in the order of the local scan: every window's best, then every second best; each round by score."""
    by_score = scores.argsort(dim=1, descending=True, stable=True)
    # How many of its own window come before a token, in the order of scores.
    same = windows[by_score][:, :, None] == windows[by_score][:, None]
    before = same.tril(-1).sum(2)
    return by_score.gather(1, before.argsort(dim=1, stable=True))
