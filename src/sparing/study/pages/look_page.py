"""The page of `sparing look`: one file that asks for nothing, with every reading inside, decoded level by level."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from sparing.evaluate.answering import Answer
from sparing.evaluate.looking import LensWords, Look
from sparing.evaluate.pictures.grids import SeenPicture
from sparing.evaluate.pictures.seeing import data_uri
from sparing.study.pages.document import render_page, write_page

STEPS = 255
THUMBNAIL, LARGEST = 480, 1024
# What a class is told by beside its colour: a letter (and in the style sheet a pattern).
LETTERS = {"alive": "", "dead": "D", "vit_sink": "V", "llm_sink": "L", "newline": "N"}
CLASS_NAMES = {"vit_sink": "ViT sink", "llm_sink": "LLM sink"}
MEANINGS = {
    "alive": "depends on the picture",
    "dead": "much the same in every picture, and no sink: says nothing of this one",
    "vit_sink": "the same in every picture; made by the vision encoder, where its norm stands out",
    "llm_sink": "the same in every picture; turns towards the prompt's first token inside the language model",
    "newline": "a learned token at the end of a row of the grid: shows nothing, and belongs to no class",
}


class Quantised(NamedTuple):
    """Numbers in 255 steps from `low` to `high`: each is at most half a step off."""

    codes: UInt8[np.ndarray, "*shape"]
    low: float
    high: float

    @property
    def error(self) -> float:
        """The most that a number can be off by."""
        return (self.high - self.low) / STEPS / 2


def quantise(values: Float[np.ndarray, "*shape"]) -> Quantised:
    """Put numbers into a byte each. What is not finite counts as the nearest number that is."""
    values = np.asarray(values, dtype=np.float64)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    codes = np.rint((values - low) * (STEPS / (high - low) if high > low else 0.0)).astype(np.uint8)
    return Quantised(codes, low, high)


def write_look(look: Look, run: Mapping[str, Any], path: Path) -> None:
    """Write the page so that `path` holds all of it or what it held before.

    Args:
        look: what is shown.
        run: the run's record: command, versions, hardware.
        path: the `.html` file.
    """
    write_page(render_look(look, run), path)


def render_look(look: Look, run: Mapping[str, Any]) -> str:
    """The page as HTML. Everything that comes from a model, a tokenizer or a file's name is escaped."""
    table = _Words(look)
    lenses = [_lens(lens, table) for lens in look.lenses]
    maps, map_error = _maps(look, table)
    classes = [
        {
            "name": CLASS_NAMES.get(name, name),
            "key": name if name in LETTERS else f"other{i % 3}",
            "letter": LETTERS.get(name, name[:1].upper()),
            "meaning": MEANINGS.get(name, ""),
            "count": count,
            "share": count / max(1, len(look.index)),
        }
        for i, (name, count) in enumerate(look.classes.counts.items())
    ]
    data = {
        "levels": look.levels,
        "depth": look.depth,
        "n": len(look.index),
        "index": look.index.tolist(),
        "classes": classes,
        "of": _packed(look.classes.of.astype(np.uint8)),
        "lenses": lenses,
        "norms": [_packed(level.astype("<f4")) for level in look.norms],
        "wide": table.wide,
        "words": table.words,
        "maps": maps,
        **_pictures(look.pictures),
    }
    names = list(dict.fromkeys(p.name.split(" · ")[0] for p in look.pictures))
    return render_page(
        "look.html.j2",
        {"tally": _tally},
        look=look,
        run=run,
        run_json=json.dumps({k: v for k, v in run.items() if k != "figures"}, indent=2, default=str),
        data=data,
        title=", ".join(names),
        model=look.model["name"].rstrip("/").split("/")[-1],
        classes=classes,
        k=look.lenses[0].ids.shape[-1],
        errors=[(lens["name"], lens["unit"], lens["error"]) for lens in lenses],
        map_error=map_error,
        notes=list(
            dict.fromkeys(
                [f"{p.name.split(' · ')[0]}: {note}" for p in look.pictures for note in p.notes] + [*look.notes]
            )
        ),
    )


def _tally(answers: Sequence[Answer], dense: str) -> list[tuple[str, int, bool]]:
    """Different answers with their numbers, most frequent first, and whether it is the dense one."""
    return [(text, n, text == dense) for text, n in Counter(answer.text for answer in answers).most_common()]


class _Words:
    """Each word that occurs once, by its place in a list. A word of several pieces is its own, not its pieces."""

    def __init__(self, look: Look) -> None:
        self.names = look.words
        self.places: dict[int | tuple[int, ...], int] = {}
        # Places are counted before they are given: how wide they are is the same everywhere.
        self.wide = 2 if len(look.words) + len(look.maps.ids) <= 1 << 16 else 4

    def place(self, word: int | tuple[int, ...]) -> int:
        """Where a word is in the list; a new one is added."""
        word = word[0] if isinstance(word, tuple) and len(word) == 1 else word
        return self.places.setdefault(word, len(self.places))

    @property
    def words(self) -> list[str]:
        """The list."""
        return [
            self.names[word] if isinstance(word, int) else "".join(self.names[piece] for piece in word)
            for word in self.places
        ]


def _lens(lens: LensWords, table: _Words) -> dict[str, Any]:
    """A lens's words and scores, each level on its own."""
    different, inverse = np.unique(lens.ids, return_inverse=True)
    local = np.array([table.place(word) for word in different.tolist()])[inverse.reshape(lens.ids.shape)]
    levels = [quantise(level) for level in lens.scores]
    return {
        "name": lens.name,
        "unit": lens.unit,
        "ids": [_packed(level.astype("<u2" if table.wide == 2 else "<u4")) for level in local],
        "scores": [_packed(level.codes) for level in levels],
        "ranges": [[_short(level.low), _short(level.high)] for level in levels],
        "error": max(level.error for level in levels),
    }


def _maps(look: Look, table: _Words) -> tuple[dict[str, Any], float]:
    """The cosines of single words, word after word within a level, and the most that one of them is off by."""
    levels = [[quantise(word) for word in level.T] for level in look.maps.scores]
    error = max((word.error for level in levels for word in level), default=0.0)
    packed = {
        "words": [table.place(word) for word in look.maps.ids],
        "scores": [_packed(np.concatenate([word.codes for word in level])) if level else "" for level in levels],
        "ranges": [[[_short(word.low), _short(word.high)] for word in level] for level in levels],
    }
    return packed, error


def _pictures(pictures: Sequence[SeenPicture]) -> dict[str, Any]:
    """The grids with their pictures; each original once."""
    originals: list[Image.Image] = []
    found = []
    for picture in pictures:
        # Parts of one picture share it: it is kept with the first of them.
        known = next((i for i, one in enumerate(originals) if one is picture.original), None)
        if known is None:
            originals.append(picture.original)
        found.append(
            {
                "name": picture.name,
                "src": data_uri(picture.image, LARGEST),
                "size": picture.image.size,
                "original": len(originals) - 1 if known is None else known,
                "places": picture.places.tolist(),
                "extra": picture.extra,
            }
        )
    return {"grids": found, "originals": [{"src": data_uri(one, THUMBNAIL), "size": one.size} for one in originals]}


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _short(value: float) -> float:
    return float(f"{value:.6g}")
