"""DivPrune: keep the picture tokens that are furthest from each other."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparing.plan import PromptView
from sparing.policies.pictures import PicturePruning, rows_at
from sparing.tokens import ImageSpan


class DivPrune(PicturePruning):
    """Solve the max-min diversity problem greedily over what the projector gave for a picture, before the first layer.

    The distance of two tokens is `1 - cosine`. The first token is the one whose nearest neighbour is furthest away; each next one
    is that whose distance to the nearest chosen token is largest. It looks at neither attention nor the question.

    Args:
        keep: share of each picture's tokens that stays.

    Raises:
        ValueError: a share that is not above 0 and at most 1.

    Paper: DivPrune (2503.02175), algorithm 1 on the max-min diversity problem; the main results keep 9.8% before the first layer.
    Differs: the release handles one picture a row, in a batch of one; newline tokens (LLaVA-NeXT) compete there like any other,
        here they stay. It can prune at a later layer too (`LAYER_INDEX`); the paper's results are before the first. Distances are
        in float32 here, and of two tokens that are each other's nearest, which tie as the first choice, the earlier one is taken.
    """

    def __init__(self, keep: float = 0.098) -> None:
        super().__init__(keep)

    @classmethod
    def release(cls) -> DivPrune:
        """As the released scripts do it (and the paper): 9.8% before the first layer."""
        return cls()

    def choose(
        self, view: PromptView, layout: ImageSpan, rows: Int[Tensor, " p"], index: Int[Tensor, "p n"], count: int
    ) -> Int[Tensor, "p count"]:
        """The most diverse tokens."""
        states = rows_at(view.embeds, rows, index).detach().float()
        pictures, size, width = states.shape
        view.spend(2 * pictures * size * size * width)
        unit = torch.nn.functional.normalize(states, dim=-1)
        cosine = unit @ unit.mT
        # Two tokens that are each other's nearest are equally far: exactly so, or rounding would choose between them.
        return most_diverse(1 - (cosine + cosine.mT) / 2, count)

    def __repr__(self) -> str:
        """As constructed."""
        return f"DivPrune({self.keep:g})"


def most_diverse(distance: Float[Tensor, "p n n"], count: int) -> Int[Tensor, "p count"]:
    """The greedy solution of the max-min diversity problem, in the order in which it is found."""
    pictures, size, _ = distance.shape
    each = torch.arange(pictures, device=distance.device)
    itself = torch.eye(size, dtype=torch.bool, device=distance.device)
    # The first is the one whose nearest other token is furthest away.
    pick = distance.masked_fill(itself, float("inf")).amin(1).argmax(1)
    nearest = torch.full_like(distance[:, 0], float("inf"))
    chosen = [pick]
    while len(chosen) < count:
        nearest = torch.minimum(nearest, distance[each, pick]).scatter(1, pick[:, None], float("-inf"))
        pick = nearest.argmax(1)
        chosen.append(pick)
    return torch.stack(chosen, dim=1)
