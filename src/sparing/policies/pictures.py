"""What the methods share that choose some tokens of each picture, once, before the first layer."""

from __future__ import annotations

import abc
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparing.plan import Policy, PromptView
from sparing.tokens import Group, ImageSpan, TokenMap


class PicturePruning(Policy):
    """Keeps some tokens of each picture and drops the others before the first layer.

    Each picture (each tile, where tiles are spans of their own) keeps its own share, whatever else is in its row: to the nearest,
    halves up, and at least one token. Newline tokens show nothing: they are no candidates, and stay. Positions are kept. Pictures
    of later turns are not pruned: it decides once, at the first prompt.

    Args:
        keep: share of a picture's tokens that stays.

    Raises:
        ValueError: a share that is not above 0 and at most 1; (on a prompt) image tokens of which no one knows which picture they
            belong to.
    """

    causal = False

    def __init__(self, keep: float) -> None:
        if not 0 < keep <= 1:
            raise ValueError(
                f"{type(self).__name__}(keep={keep}): the share to keep lies above 0 and at most at 1 "
                "(DropTokens(groups=[Group.IMAGE]) drops all)"
            )
        self.keep = keep

    def idle(self, tokens: TokenMap) -> bool:
        """There are no pictures, or all of their tokens are kept."""
        return self.keep == 1 or not tokens.has(Group.IMAGE)

    def start(self, view: PromptView) -> None:
        """Choose, picture by picture; those of one layout at once."""
        gone = torch.zeros_like(view.tokens.valid)
        for layout, rows, index in alike(view.tokens):
            chosen = self.choose(view, layout, rows, index, number_kept(index.shape[1], self.keep))
            gone[rows[:, None], index] = True
            gone[rows[:, None], index.gather(1, chosen)] = False
        view.drop(gone)

    @abc.abstractmethod
    def choose(
        self, view: PromptView, layout: ImageSpan, rows: Int[Tensor, " p"], index: Int[Tensor, "p n"], count: int
    ) -> Int[Tensor, "p count"]:
        """Which tokens of some pictures of one layout stay: places among their `n`. May rewrite `view.embeds`; drops nothing itself.

        Args:
            view: the prompt.
            layout: the pictures' span, as if it started at 0.
            rows: in which row of the batch each picture is.
            index: the original index of each of its tokens that show something.
            count: how many stay.
        """

    def picture_shares(self, depth: int) -> tuple[float, ...]:
        """The same in all layers."""
        return (self.keep,) * depth


def number_kept(size: int, keep: float) -> int:
    """That share of `size` tokens: to the nearest, halves up, at least one."""
    return max(1, math.floor(size * keep + 0.5 + 1e-9))


def alike(tokens: TokenMap) -> list[tuple[ImageSpan, Tensor, Tensor]]:
    """The pictures of a prompt, those of one layout together: the layout, their rows `[p]`, their tokens' indices `[p n]`.

    Raises:
        ValueError: there are image tokens, but the map knows no pictures.
    """
    found: dict[ImageSpan, list[tuple[int, Tensor]]] = {}
    for r, row in enumerate(tokens.images):
        for span in row:
            layout = span._replace(start=0, stop=span.stop - span.start)
            found.setdefault(layout, []).append((r, span.encoded()))
    if not found and tokens.has(Group.IMAGE):
        raise ValueError(
            "there are image tokens, but the TokenMap does not say which pictures they make: build it from what the model's "
            "processor returned, or pass images= to TokenMap.from_groups"
        )
    device = tokens.group.device
    return [
        (layout, torch.tensor([r for r, _ in each], device=device), torch.stack([i for _, i in each]).to(device))
        for layout, each in found.items()
    ]


def rows_at(values: Float[Tensor, "b t *c"], rows: Int[Tensor, " p"], index: Int[Tensor, "p n"]) -> Tensor:
    """What the tokens `index` of pictures in `rows` have, `[p n *c]`."""
    return values[rows[:, None], index]


def others_than(chosen: Int[Tensor, "p c"], size: int) -> Int[Tensor, "p m"]:
    """The places among `size` that are not chosen, in order."""
    mark = torch.zeros(len(chosen), size, dtype=torch.int8, device=chosen.device).scatter(1, chosen, 1)
    return mark.argsort(dim=1, stable=True)[:, : size - chosen.shape[1]]
