"""`look`: what a model's visual tokens are, for one question about some pictures. What the page of `sparing look` shows."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL.Image import Image

from sparing.evaluate.answering import Arm


@dataclasses.dataclass(frozen=True, eq=False)
class SeenPicture:
    """One grid of visual tokens: a picture, or a tile of one.

    Attributes:
        name: of the picture, and which part of it this is.
        image: what the encoder was given of it, the grid evenly over it.
        original: the picture before the processor; the same for all parts of one picture.
        places: `[height width]`, which of the `n` tokens each cell of the grid is.
        extra: tokens of it that are no cell of the grid: which of the `n`, and what it is.
        notes: what was done to the picture before.
    """

    name: str
    image: Image
    original: Image
    places: Int[np.ndarray, "h w"]
    extra: tuple[tuple[int, str], ...] = ()
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class LensWords:
    """What one lens read: the `k` best words of each token at each level.

    Attributes:
        name: of the lens.
        unit: what the scores are.
        ids: token ids, best first.
        scores: their scores.
    """

    name: str
    unit: str
    ids: Int[np.ndarray, "levels n k"]
    scores: Float[np.ndarray, "levels n k"]


@dataclasses.dataclass(frozen=True, eq=False)
class WordMaps:
    """The cosine of every visual token to single words, whether or not these are among its best.

    Attributes:
        ids: token ids of the words.
        scores: the cosines.
        complete: whether these are all words of the vocabulary.
    """

    ids: tuple[int, ...]
    scores: Float[np.ndarray, "levels n words"]
    complete: bool


@dataclasses.dataclass(frozen=True, eq=False)
class TokenClasses:
    """What kind of token each visual token is.

    Attributes:
        names: of the classes, those that no token here belongs to included.
        of: `[n]`, which of `names`.
        source: where the classes come from.
        notes: what finding them has to say, such as that a class does not exist in this model.
    """

    names: tuple[str, ...]
    of: Int[np.ndarray, " n"]
    source: str
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """How many tokens there are of each class."""
        return {name: int((self.of == i).sum()) for i, name in enumerate(self.names)}


@dataclasses.dataclass(frozen=True, eq=False)
class Look:
    """What a model's visual tokens are, for one question about some pictures.

    `n` are the visual tokens in the order of the prompt, levels are as in `sparing.lens.record`.

    Attributes:
        model: name, family, layers, parameters, dtype and device.
        question: as asked.
        answer: the model's own.
        prompt_tokens: tokens of the prompt, visual ones included.
        pictures: the grids.
        index: original index of each visual token.
        levels: which levels are kept.
        depth: layers of the model.
        norms: length of the residual stream.
        lenses: what the lenses read.
        words: every token id that occurs, in words.
        maps: which words can be searched for everywhere, with their cosines.
        classes: of the visual tokens.
        arms: answers with all tokens, and without some of them.
        notes: what the reader must know: what was left out, and why.
        seconds: how long looking took.
    """

    model: dict[str, Any]
    question: str
    answer: str
    prompt_tokens: int
    pictures: tuple[SeenPicture, ...]
    index: Int[np.ndarray, " n"]
    levels: tuple[int, ...]
    depth: int
    norms: Float[np.ndarray, "levels n"]
    lenses: tuple[LensWords, ...]
    words: dict[int, str]
    maps: WordMaps
    classes: TokenClasses
    arms: tuple[Arm, ...]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The figures, for `run.json`: not the readings, which the page holds."""
        return {
            "model": self.model,
            "question": self.question,
            "answer": self.answer,
            "prompt_tokens": self.prompt_tokens,
            "pictures": [
                {"name": p.name, "grid": list(p.places.shape), "extra": len(p.extra), "notes": list(p.notes)}
                for p in self.pictures
            ],
            "visual_tokens": len(self.index),
            "levels": list(self.levels),
            "classes": {
                "counts": self.classes.counts,
                "source": self.classes.source,
                "notes": list(self.classes.notes),
            },
            "arms": [dataclasses.asdict(arm) for arm in self.arms],
            "searchable": {"words": len(self.maps.ids), "all": self.maps.complete},
            "notes": list(self.notes),
            "seconds": self.seconds,
        }
