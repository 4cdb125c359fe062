"""EmbedLens: which words of the input embedding a token's state lies nearest to, and which tokens lie nearest to a word."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sparing.anatomy import Anatomy, anatomy_of
from sparing.lens import screened
from sparing.lens.nearest import ROWS, WORDS, Best, directions, mean_word, parts, rows
from sparing.lens.record import Recording
from sparing.lens.words import WordReading, chosen_words, read_states
from sparing.tokens import Group

Variant = Literal["cosine", "centred", "csls"]
NEIGHBOURS = 10
"""Neighbours that CSLS measures hubness by."""


@torch.no_grad()
def embedding_lens(
    model: nn.Module,
    inputs: Mapping[str, Any] | Recording,
    *,
    k: int = 10,
    levels: Iterable[int] | None = None,
    where: Group | Iterable[Group] | Bool[Tensor, "b t"] | None = None,
    variant: Variant = "cosine",
    vocabulary: Iterable[int] | Tensor | None = None,
    chunk: int = WORDS,
) -> WordReading:
    """The words whose input embeddings a token's state is nearest to, at every level.

    What is compared: the residual stream as it is (no final norm, no output matrix), and the words as they enter the first layer. A
    factor that a family gives its embeddings (Gemma) is in both and in no cosine. The score of word `e` for state `h`:

    - `cosine`: `cos(h, e)`.
    - `centred`: `cos(h - mean h, e - mean e)`. The mean state is that of the tokens read, of all rows, at this level; the mean
      word that of the whole matrix. What all states share, or all words, no longer decides.
    - `csls`: `2 cos(h, e) - r(h) - r(e)`. `r(h)` is the mean cosine of a state to its 10 nearest words of the whole matrix, `r(e)`
      that of a word to its 10 nearest of the states read at this level (to all, if there are fewer): words that are near
      everything lose.

    `centred` and `csls` look at all tokens that are read together, so read many: their scores change with what else is in the batch.
    `vocabulary` only says which words may be named; no score depends on it. A vector of zeros has cosine 0 to everything. All is
    compared in float32; where hardware multiplies bf16 faster, candidates are found in it and proven in float32.

    Args:
        model: a Hugging Face model of a known family.
        inputs: what its processor returned, or a recording.
        k: words a token and level.
        levels: which levels to read (see `Recording`): all by default.
        where: which tokens to read, as in `record`. By default the image tokens of inputs (none are an empty reading), and all that a
            recording holds.
        variant: the score.
        vocabulary: ids that may be named; all by default.
        chunk: words compared at a time. Memory grows with it and not with the vocabulary; the result does not depend on it.

    Returns:
        The reading; its scores are those above.

    Raises:
        ValueError: no such variant or level, more words asked for than there are, states or embeddings that are not finite, one token
            alone under `centred`, or a recording of another model.

    Paper: EmbedLens (2603.00510): TopK_i cos(h, E_i) with the input embedding matrix E, at every layer.
        CSLS is from Conneau et al. (1710.04087), with its 10 neighbours.
    Differs: the release reads one patch at a time, from fixed places. `centred` and `csls` are ours.
    """
    anatomy = anatomy_of(model)
    _check(variant)
    ids = chosen_words(vocabulary, anatomy.vocabulary, k, anatomy.model.get_input_embeddings().weight.device)
    recording, norms = read_states(model, inputs, anatomy, where, levels)
    shape = norms.shape
    best = Best(norms.numel(), k, norms.device)
    if norms.numel():
        sides = _Sides(anatomy, recording, variant)
        if variant == "csls":
            sides.csls(best, ids, chunk)
        else:
            sides.cosine(best, ids, chunk)
    return WordReading(
        recording.tokens,
        recording.levels,
        recording.index,
        best.ids.view(*shape, k),
        best.scores.view(*shape, k),
        norms,
    )


@torch.no_grad()
def find_words(
    model: nn.Module,
    inputs: Mapping[str, Any] | Recording,
    ids: Sequence[int | Sequence[int]],
    *,
    levels: Iterable[int] | None = None,
    where: Group | Iterable[Group] | Bool[Tensor, "b t"] | None = None,
    variant: Variant = "cosine",
) -> Float[Tensor, "levels n words"]:
    """The reverse query: how near each token is to given words. The patches that show a word are those with the highest scores.

    Args:
        model: a Hugging Face model of a known family.
        inputs: what its processor returned, or a recording.
        ids: the words. One of several pieces is a sequence of ids, and stands for the mean of the pieces' embeddings.
        levels: as in `embedding_lens`.
        where: as in `embedding_lens`; tokens come in the order of its `index`.
        variant: as in `embedding_lens`.

    Returns:
        The scores, float32, as `embedding_lens` gives them.

    Raises:
        ValueError: as in `embedding_lens`, and for words without pieces.

    Paper: EmbedLens (2603.00510), the released notebook: a word's embedding against all patches.
    Differs: the release asks for words of one piece; the mean of several is ours.
    """
    anatomy = anatomy_of(model)
    _check(variant)
    pieces = [[word] if isinstance(word, int) else list(word) for word in ids]
    if not all(pieces):
        raise ValueError("find_words: a word without any piece: give each word one id or more")
    device = anatomy.model.get_input_embeddings().weight.device
    every = [piece for word in pieces for piece in word]
    if every:
        chosen_words(every, anatomy.vocabulary, 1, device)
    recording, norms = read_states(model, inputs, anatomy, where, levels)
    if not norms.numel() or not pieces:
        return norms.new_zeros(*norms.shape, len(pieces))
    vectors = anatomy.embed(torch.tensor(every, device=device)).float()
    words = torch.stack([part.mean(0) for part in vectors.split([len(word) for word in pieces])])
    sides = _Sides(anatomy, recording, variant)
    words = sides.words(words)
    scores = torch.stack([sides.states(level) @ words.T for level in range(len(recording.levels))])
    if variant != "csls":
        return scores
    best = Best(norms.numel(), min(NEIGHBOURS, anatomy.vocabulary), norms.device)
    sides.cosine(best, None, WORDS)
    near = scores.topk(min(NEIGHBOURS, scores.shape[1]), dim=1).values.mean(1, keepdim=True)
    return 2 * scores - near - best.scores.mean(-1).view(*norms.shape, 1)


def _check(variant: str) -> None:
    if variant not in get_args(Variant):
        raise ValueError(f"variant={variant!r}: expected one of {', '.join(map(repr, get_args(Variant)))}")


class _Sides:
    """The two sides of the cosines: states and words, centred where the variant asks for it."""

    def __init__(self, anatomy: Anatomy, recording: Recording, variant: str) -> None:
        self.anatomy, self.raw = anatomy, recording.states
        self.word_centre = self.state_centre = None
        if variant == "centred":
            if self.raw.shape[1] < 2:
                raise ValueError("centred: one token alone is its own mean: read several, or use variant='cosine'")
            self.word_centre = mean_word(anatomy).to(self.raw.device)
            self.state_centre = self.raw.mean(1, dtype=torch.float32)

    def words(self, vectors: Tensor) -> Tensor:
        """Unit vectors of words `[w d]`."""
        vectors = vectors.to(self.raw.device).float()
        return directions(vectors if self.word_centre is None else vectors - self.word_centre)

    def states(self, level: int) -> Tensor:
        """Unit vectors of the states of a level, `[n d]`."""
        states = self.raw[level].float()
        return directions(states if self.state_centre is None else states - self.state_centre[level])

    def cosine(self, best: Best, ids: Tensor | None, chunk: int) -> None:
        """Each part of the vocabulary once, against all levels and tokens."""
        unit = torch.empty(self.raw.shape, device=self.raw.device)
        for level in range(len(unit)):
            unit[level] = self.states(level)
        unit = unit.flatten(0, 1)

        def words() -> Iterator[tuple[Tensor, Tensor]]:
            for part, vectors in parts(self.anatomy, ids, chunk):
                yield part.to(unit.device), self.words(vectors)

        among = self.anatomy.vocabulary if ids is None else len(ids)
        if among > 4 * screened.candidates(best.ids.shape[1]) and screened.pays(unit.device):
            table = self.anatomy.model.get_input_embeddings().weight
            left = screened.find(best, unit, words, lambda some: self.words(self.anatomy.embed(some.to(table.device))))
            if not bool(left.any()):
                return
            rest = Best(int(left.sum()), best.ids.shape[1], unit.device)
            _compare(rest, unit[left], words())
            best.scores[left], best.ids[left] = rest.scores, rest.ids
        else:
            _compare(best, unit, words())

    def csls(self, best: Best, ids: Tensor | None, chunk: int) -> None:
        """Level by level: a word's neighbours are the states of one level, all of which it must meet at once."""
        levels, n, _ = self.raw.shape
        chunk = min(chunk, max(1, ROWS * WORDS // n))
        near = Best(levels * n, min(NEIGHBOURS, self.anatomy.vocabulary), self.raw.device)
        self.cosine(near, None, chunk)
        for level in range(levels):
            unit, at = self.states(level), slice(level * n, (level + 1) * n)
            for part, vectors in parts(self.anatomy, ids, chunk):
                cosine = unit @ self.words(vectors).T
                hub = cosine.topk(min(NEIGHBOURS, n), dim=0).values.mean(0)
                best.add(at, 2 * cosine - hub, part.to(unit.device))
        best.scores -= near.scores.mean(-1, keepdim=True)


def _compare(best: Best, unit: Tensor, words: Iterator[tuple[Tensor, Tensor]]) -> None:
    """All words with all states, in float32."""
    for part, vectors in words:
        for at in rows(len(unit)):
            best.add(at, unit[at] @ vectors.T, part)
