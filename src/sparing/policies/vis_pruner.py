"""VisPruner: keep the tokens to which the vision encoder attends most, and of the others those that are no duplicates."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparing.plan import PromptView
from sparing.policies.pictures import PicturePruning, rows_at
from sparing.tokens import ImageSpan

AT_ONCE = 8
"""Duplicates that one round removes."""


class VisPruner(PicturePruning):
    """Important tokens by the encoder's attention, diverse ones by removing duplicates in rounds; before the first layer.

    Important are those that receive most attention in the encoder layer whose output is projected (from the class token; without
    one, from all patches on average). The others, ordered by attention, are halved in turn into two sets; the tokens of the first
    set whose best cosine to the second is highest are removed, eight a round at most, and the rest is halved again, until the
    budget is met. Cosines are of what the projector reads. It does not look at the question.

    Args:
        keep: share of each picture's tokens that stays, important and diverse.
        important: share of those that are important, rounded down.
        encoder_layer: another layer of the encoder to look at: its number (negative from the end) or a share of its depth.

    Raises:
        ValueError: a share of tokens that is not above 0 and at most 1, a share of important ones outside 0..1.

    Paper: VisPruner (2412.01818; its first version is FasterVLM, `important=1`). The release's scripts take 64 to 128 of 576 tokens,
        half or three quarters of them important.
    Differs: the order of what is left decides who meets whom, and is the release's: survivors of the first set by falling
        similarity, then the second set. The release fails on odd numbers of leftover tokens; here the first set has one more. Tiles
        of LLaVA-NeXT keep the same number each there, here each picture keeps its share.
    """

    def __init__(
        self, keep: float = 128 / 576, *, important: float = 0.5, encoder_layer: int | float | None = None
    ) -> None:
        super().__init__(keep)
        if not 0 <= important <= 1:
            raise ValueError(f"VisPruner(important={important}): the share of important tokens lies between 0 and 1")
        self.important, self.encoder_layer = important, encoder_layer
        self.looks_at_encoder = (encoder_layer,)

    def choose(
        self, view: PromptView, layout: ImageSpan, rows: Int[Tensor, " p"], index: Int[Tensor, "p n"], count: int
    ) -> Int[Tensor, "p count"]:
        """Important and diverse tokens."""
        received = rows_at(view.encoder_attention(self.encoder_layer), rows, index)
        number = int(count * self.important + 1e-9)
        order = received.argsort(dim=1, descending=True, stable=True)
        important, others = order[:, :number], order[:, number:]
        if number == count:
            return important
        states = torch.nn.functional.normalize(rows_at(view.encoder_states(), rows, index).detach().float(), dim=-1)
        view.spend(2 * states.numel() * states.shape[1])
        return torch.cat([important, _without_duplicates(states @ states.mT, others, count - number)], dim=1)

    def __repr__(self) -> str:
        """As constructed."""
        where = "" if self.encoder_layer is None else f", encoder_layer={self.encoder_layer}"
        return f"VisPruner({self.keep:g}, important={self.important:g}{where})"


def _without_duplicates(cosine: Float[Tensor, "p n n"], left: Int[Tensor, "p m"], count: int) -> Int[Tensor, "p count"]:
    """Remove from `left`, round by round, what is most like the other half, until `count` are left."""
    each = torch.arange(len(left), device=left.device)[:, None, None]
    while (over := left.shape[1] - count) > 0:
        first, second = left[:, ::2], left[:, 1::2]
        if not second.shape[1]:
            break
        best = cosine[each, first[:, :, None], second[:, None]].amax(2)
        survivors = best.argsort(dim=1, descending=True, stable=True)[:, min(AT_ONCE, over, first.shape[1]) :]
        left = torch.cat([first.gather(1, survivors), second], dim=1)
    return left
