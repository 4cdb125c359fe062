"""Exchange what tokens hold: does the answer follow the patch?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sparing.ablate.places import Where, named, pictures_of, settled, tokens_at
from sparing.ablate.rewriting import Rewrite, at_layer
from sparing.plan import Policy, PromptView, Selection
from sparing.tokens import Group, ImageSpan, TokenMap

Place = int | tuple[int, int]
"""An original index, or a cell of a picture's grid (row, column)."""
Pairs = Sequence[tuple[Place, Place]]


class _SwapTokens(Rewrite):
    """See `swap_tokens`."""

    name = "swap_tokens"  # type: ignore[assignment]

    def __init__(self, pairs: Pairs | Mapping[int, Pairs] | Where, picture: int, seed: int, layer: int) -> None:
        super().__init__(layer)
        self.picture, self.seed = picture, seed
        self.pairs: Pairs | Mapping[int, Pairs] | None = None
        self.where: object = None
        if isinstance(pairs, Mapping):
            self.pairs = {row: _pairs(those) for row, those in pairs.items()}
        elif isinstance(pairs, Group | Selection | Tensor) or callable(pairs) or _all_groups(pairs):
            self.where = settled(pairs, "swap_tokens(...)")  # type: ignore[arg-type]
        else:
            self.pairs = _pairs(pairs)

    def settle(self, view: PromptView) -> dict[str, Tensor]:
        tokens = view.tokens
        order = torch.arange(tokens.length).repeat(tokens.batch, 1)
        if self.where is not None:
            self._mix(view, order)
        else:
            for row, pairs in self._by_row(tokens):
                for one, other in pairs:
                    i, j = (self._index(tokens, row, place) for place in (one, other))
                    order[row, [i, j]] = order[row, [j, i]]
        return {"order": order.to(tokens.group.device)}

    def _by_row(self, tokens: TokenMap) -> Iterable[tuple[int, Pairs]]:
        if not isinstance(self.pairs, Mapping):
            assert self.pairs is not None
            # Rows of text alone have nothing to exchange.
            return [
                (row, self.pairs) for row in range(tokens.batch) if tokens.images[row] or not _has_cells(self.pairs)
            ]
        if strange := [row for row in self.pairs if not 0 <= row < tokens.batch]:
            raise ValueError(f"swap_tokens: there is no row {strange[0]} in a batch of {tokens.batch}")
        return self.pairs.items()

    def _index(self, tokens: TokenMap, row: int, place: Place) -> int:
        if isinstance(place, int):
            if not 0 <= place < tokens.length or not bool(tokens.valid[row, place]):
                raise ValueError(
                    f"swap_tokens: row {row} has no token {place}: give an original index within the prompt that is no padding"
                )
            return place
        spans: tuple[ImageSpan, ...] = tokens.images[row]
        if not 0 <= self.picture < len(spans):
            raise ValueError(f"swap_tokens: row {row} has {len(spans)} pictures, so none numbered {self.picture}")
        (height, width), (down, across) = spans[self.picture].grid, place
        if not (0 <= down < height and 0 <= across < width):
            raise ValueError(
                f"swap_tokens: the picture's grid has {height} x {width} tokens, so there is no cell {tuple(place)}"
            )
        return int(spans[self.picture].patches()[down, across])

    def _mix(self, view: PromptView, order: Tensor) -> None:
        """The chosen tokens of a picture (of a row's text) change places, none stays."""
        chosen = tokens_at(view, self.where, "swap_tokens(...)").cpu()
        part = pictures_of(view.tokens).cpu()
        for row in range(len(order)):
            for one in part[row][chosen[row]].unique().tolist():
                index = (chosen[row] & (part[row] == one)).nonzero().flatten()
                generator = torch.Generator().manual_seed(self.seed)
                drawn = index[torch.randperm(len(index), generator=generator)]
                order[row, drawn] = drawn.roll(1)

    def rewritten(self, states: Tensor, settled: dict[str, Tensor]) -> Tensor:
        return states.gather(1, settled["order"].unsqueeze(-1).expand_as(states))

    def __repr__(self) -> str:
        """As called."""
        if self.where is not None:
            return f"swap_tokens({named(self.where)}, seed={self.seed}{at_layer(self.layer)})"
        picture = f", picture={self.picture}" if self.picture else ""
        return f"swap_tokens({self.pairs}{picture}{at_layer(self.layer)})"


def _all_groups(given: object) -> bool:
    return isinstance(given, Iterable) and bool(those := list(given)) and all(isinstance(g, Group) for g in those)


def _pairs(given: object) -> Pairs:
    """Checked for form; whether the places exist is seen in the prompt."""
    try:
        pairs = tuple((_place(one), _place(other)) for one, other in given)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise ValueError(
            "swap_tokens: expected pairs such as [((0, 1), (2, 2))] (cells of the grid) or [(7, 9)] (original indices), a mapping "
            f"row -> pairs, groups or a selection; got {given!r}"
        ) from error
    flat = [place for pair in pairs for place in pair]
    if len(set(flat)) != len(flat):
        raise ValueError(f"swap_tokens: a place stands in two pairs of {given!r}: exchange each once")
    return pairs


def _place(given: object) -> Place:
    if isinstance(given, int):
        return given
    down, across = given  # type: ignore[misc]
    return int(down), int(across)


def _has_cells(pairs: Pairs) -> bool:
    return any(not isinstance(place, int) for pair in pairs for place in pair)


def swap_tokens(
    pairs: Pairs | Mapping[int, Pairs] | Group | Iterable[Group] | Selection | Callable[[TokenMap], Tensor] | Tensor,
    *,
    picture: int = 0,
    seed: int = 0,
    layer: int = 0,
) -> Policy:
    """Exchange what tokens of the prompt hold. Places keep their positions, so that each token stands where the other stood.

    The result goes into `sparing.apply` like a policy, under `execute="dense"`.

    Args:
        pairs: what changes places with what. Cells `(row, column)` of a picture's grid or original indices; the same pairs in every
            row that has a picture, or a mapping from rows of the batch to their own pairs (beam search repeats rows). Or
            groups, a `Selection`, a function of the `TokenMap` or a mask: those tokens change places with each other at random,
            within each picture and within the row's text; none stays where it was, unless it is alone.
        picture: whose cells, counted from 0 in each row.
        seed: of the random order.
        layer: at whose input; 0 is the prompt's embeddings.

    Raises:
        ValueError: a place that stands in two pairs, or (when applied) a cell, token, row, picture or layer that does not exist.

    Paper: for the claim that visual tokens hold what they show before the first layer (EmbedLens, 2603.00510): if a patch's
        token carries the answer, the answer follows it.
    Differs: what some models add to image tokens in later layers (DeepStack) stays in its place.
    """
    return _SwapTokens(pairs, picture, seed, layer)
