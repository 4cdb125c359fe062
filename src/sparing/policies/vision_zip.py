"""VisionZip: keep the tokens to which the vision encoder attends most, and fold the others into a few."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from sparing.plan import PromptView
from sparing.policies.pictures import PicturePruning, others_than, rows_at
from sparing.tokens import ImageSpan


class VisionZip(PicturePruning):
    """Dominant tokens by the encoder's attention, contextual ones by merging what is left over; before the first layer.

    Dominant are those that receive most attention in the encoder layer whose output is projected (from the class token; without
    one, from all patches on average). Of the others, in order, evenly spaced ones are targets. Each of the rest goes to the target
    whose key (mean over heads, same layer) is most like its own by cosine, and a target becomes *itself plus the mean* of what went
    to it. That is done on what the projector reads; the sums are then projected and stand in their targets' places. It does not
    look at the question.

    Args:
        keep: share of each picture's tokens that stays, dominant and contextual.
        contextual: share of those that are contextual, to the nearest.
        encoder_layer: another layer of the encoder to look at: its number (negative from the end) or a share of its depth.

    Raises:
        ValueError: a share of tokens that is not above 0 and at most 1, a share of contextual ones outside 0..1.

    Paper: VisionZip (2412.04467), training-free: 54 + 10 of 576 tokens (also 108 + 20 and 162 + 30).
    Differs: the release lets the language model read the class token too, as one of the dominant ones, although LLaVA's projector
        never did; the prompt has no place for it, so one more patch is kept here. It puts contextual tokens behind all dominant
        ones and renumbers positions; here every token stays where it was. Tiles of LLaVA-NeXT keep the same number each there, here
        each picture keeps its share. The released module is for CLIP; how keys of rotary encoders (Qwen) are compared could not be
        confirmed: here as they are before rotation, and the mean of a token's patches. Qwen3-VL's features of earlier layers are
        added to a contextual token as to its target. Not here: the fine-tuned projector.
    """

    def __init__(
        self, keep: float = 64 / 576, *, contextual: float = 10 / 64, encoder_layer: int | float | None = None
    ) -> None:
        super().__init__(keep)
        if not 0 <= contextual <= 1:
            raise ValueError(f"VisionZip(contextual={contextual}): the share of contextual tokens lies between 0 and 1")
        self.contextual, self.encoder_layer = contextual, encoder_layer
        self.looks_at_encoder = (encoder_layer,)

    def choose(
        self, view: PromptView, layout: ImageSpan, rows: Int[Tensor, " p"], index: Int[Tensor, "p n"], count: int
    ) -> Int[Tensor, "p count"]:
        """Dominant tokens and the targets of the others."""
        received = rows_at(view.encoder_attention(self.encoder_layer), rows, index)
        number = min(int(count * self.contextual + 0.5 + 1e-9), count)
        dominant = received.argsort(dim=1, descending=True, stable=True)[:, : count - number]
        if not number:
            return dominant
        left = others_than(dominant, index.shape[1])
        step = max(1, left.shape[1] // number)
        place = torch.arange(0, step * number, step, device=index.device)
        targets, merged = left[:, place], left[:, others_than(place[None], left.shape[1])[0]]
        if merged.shape[1]:
            self._merge(view, rows, index.gather(1, targets), index.gather(1, merged))
        return torch.cat([dominant, targets], dim=1)

    def _merge(self, view: PromptView, rows: Tensor, targets: Tensor, merged: Tensor) -> None:
        """Fold `merged` `[p m]` into `targets` `[p c]` (original indices), and write what the projector makes of them."""
        keys = view.encoder_keys(self.encoder_layer)
        unit = [torch.nn.functional.normalize(rows_at(keys, rows, at).float(), dim=-1) for at in (merged, targets)]
        view.spend(2 * unit[0].numel() * targets.shape[1])
        nearest = (unit[0] @ unit[1].mT).argmax(2)
        states = view.encoder_states()
        into = torch.nn.functional.one_hot(nearest, targets.shape[1]).to(states.dtype)
        mean = into.mT @ rows_at(states, rows, merged) / into.sum(1).clamp(min=1).unsqueeze(-1)
        folded = view.project((rows_at(states, rows, targets) + mean).flatten(0, 1)).view(*targets.shape, -1)
        view.embeds = view.embeds.index_put((rows[:, None], targets), folded.to(view.embeds.dtype))

    def __repr__(self) -> str:
        """As constructed."""
        where = "" if self.encoder_layer is None else f", encoder_layer={self.encoder_layer}"
        return f"VisionZip({self.keep:g}, contextual={self.contextual:g}{where})"
