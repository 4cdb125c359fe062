"""Best words of many states, a part of the vocabulary at a time: memory does not grow with the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.anatomy import Anatomy

ROWS = 2048
"""States that meet a part of the vocabulary at a time."""
WORDS = 4096
"""Words a part, by default."""


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest of each row and their columns, best first; the lower column first where they tie.

    `torch.topk` alone leaves open which of several equal ones it returns.
    """
    width = scores.shape[1]
    k = min(k, width)
    values, columns = scores.topk(min(k + 1, width))
    open_ = values[:, k] == values[:, k - 1] if width > k else None
    # Ascending columns first, so that the stable sort leaves them so among equals.
    columns, order = columns[:, :k].sort(dim=1)
    values, order = values[:, :k].gather(1, order).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    if open_ is not None and bool(open_.any()):
        columns[open_] = scores[open_].sort(dim=1, descending=True, stable=True).indices[:, :k]
        values[open_] = scores[open_].gather(1, columns[open_])
    return values, columns


class Best:
    """The `k` best words of each state so far. Words come in ascending order of their ids.

    Args:
        states: how many states.
        k: how many words of each.
        device: of the scores.
        lowest_first: the lower id comes first where scores tie; `False` leaves it open which one does, and is faster.
    """

    def __init__(self, states: int, k: int, device: torch.device, *, lowest_first: bool = True) -> None:
        self.lowest_first = lowest_first
        self.scores = torch.full((states, k), float("-inf"), device=device)
        self.ids = torch.zeros((states, k), dtype=torch.long, device=device)

    def add(self, at: slice, scores: Tensor, ids: Tensor) -> None:
        """More words `[w]` for the states `at`, with their scores `[m w]`."""
        k = self.ids.shape[1]
        if self.lowest_first:
            values, columns = largest(scores, k)
        else:
            values, columns = scores.topk(min(k, scores.shape[1]), sorted=False)
        # Earlier ids stand in front, and a stable sort leaves them there where scores tie.
        values = torch.cat([self.scores[at], values], 1)
        found = torch.cat([self.ids[at], ids[columns]], 1)
        self.scores[at], order = (part[:, :k] for part in values.sort(dim=1, descending=True, stable=True))
        self.ids[at] = found.gather(1, order)


def rows(count: int, size: int = ROWS) -> Iterator[slice]:
    """`count` states, a part at a time."""
    return (slice(at, min(at + size, count)) for at in range(0, count, size))


def parts(anatomy: Anatomy, ids: Tensor | None, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Words and their input embeddings `[w d]`, a part at a time.

    Args:
        anatomy: of the model.
        ids: which words, in ascending order; `None` for all.
        chunk: words a part.

    Raises:
        ValueError: no words a part, or embeddings that are not finite.
    """
    if chunk < 1:
        raise ValueError(f"expected a chunk of one word or more, got {chunk}")
    if ids is None:
        ids = torch.arange(anatomy.vocabulary, device=anatomy.model.get_input_embeddings().weight.device)
    for part in ids.split(chunk):
        vectors = anatomy.embed(part)
        if not bool(torch.isfinite(vectors).all()):
            wrong = part[~torch.isfinite(vectors).all(1)]
            raise ValueError(f"the input embedding of word {int(wrong[0])} is not finite: the checkpoint is broken")
        yield part, vectors


def mean_word(anatomy: Anatomy) -> Tensor:
    """The mean of all input embeddings, `[d]`."""
    # In parts of one size, so that it does not depend on how the lens is chunked.
    return (
        torch.stack([vectors.float().sum(0) for _, vectors in parts(anatomy, None, WORDS)]).sum(0) / anatomy.vocabulary
    )


def directions(vectors: Tensor) -> Tensor:
    """Vectors `[... d]` at length one; zeros stay zeros."""
    return F.normalize(vectors, dim=-1, eps=1e-30)
