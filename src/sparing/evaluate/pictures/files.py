"""Pictures to look at: of a folder, or drawn; and a question about any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sparing.anatomy.opening import OpenedPicture, open_picture
from sparing.worlds import scenes

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})

NEUTRAL = ("What is in this picture?", "what colour is background ?")
"""Questions about any picture; the second one in the words of `worlds.scenes`."""


def pictures_in(folder: str | Path, most: int | None = None) -> list[OpenedPicture]:
    """Open the pictures of a folder in the order of their names, `most` of them.

    Raises:
        ValueError: no folder, no pictures, or one that cannot be opened.
    """
    found = picture_files(folder)
    if not found:
        raise ValueError(f"there is no picture in {folder}: its files must end in {', '.join(sorted(SUFFIXES))}")
    return [open_picture(path) for path in found[:most]]


def picture_files(folder: str | Path) -> tuple[Path, ...]:
    """The pictures of a folder in the order of their names, by their endings.

    Raises:
        ValueError: no folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no such folder: {folder}")
    return tuple(sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES))


def drawn_pictures(number: int, seed: int = 0) -> list[OpenedPicture]:
    """Pictures of the world `scenes`, of its test split."""
    stream = scenes.stream("test", seed)
    return [OpenedPicture(f"scene {i + 1}", scenes.picture(next(stream))) for i in range(number)]


def demo_picture(seed: int = 0) -> tuple[OpenedPicture, str]:
    """A picture of the world `scenes` with a few things in it, and a question about one of them."""
    rng = np.random.default_rng(seed)
    for scene in scenes.stream("test", seed):
        if len(scene.things) >= 5 and (asked := scenes.ask(scene, rng, "shape")) is not None:
            return OpenedPicture("a drawn scene", scenes.picture(scene)), asked.text
    raise AssertionError("the stream of scenes has no end")


def neutral_question(processor: Any, first: str | None = None) -> str:
    """A question about any picture, in words that a model knows.

    Args:
        processor: the model's processor, or its tokenizer.
        first: a better question, if its words are known.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    questions = NEUTRAL if first is None else (first, *NEUTRAL)
    unknown = tokenizer.unk_token_id
    known = (text for text in questions if unknown not in tokenizer(text, add_special_tokens=False)["input_ids"])
    return next(known, NEUTRAL[0])
