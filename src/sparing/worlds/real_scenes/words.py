"""The words of the real-scenes world."""

from collections.abc import Mapping
from types import MappingProxyType

from sparing.worlds.grids.words import (
    COLOUR_FACTS,
    COLOUR_WORDS,
    COUNTS,
    HORIZONTAL,
    NOTHING,
    SUMS,
    VERTICAL,
    column_words,
    row_words,
)

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PHOTO = "photo"

KINDS = (NOTHING, *DIGITS, *CLASSES)
"""What can stand in a patch. The index is the class of a patch's label; 0 is the bare background."""

COLOURS = (*COLOUR_WORDS, PHOTO)
"""What a patch is painted in: a digit's ink, the background's colour, or none of them in a photograph."""

FACTS: Mapping[str, str] = MappingProxyType({**COLOUR_FACTS, **SUMS})
"""Questions that need no picture. They are few, and the same in every split: they can only be known by heart."""

FORM = ("what", "digit", "colour", "is", "in", "at", "behind", "background", "how", "many", "where", "from", "?", ".")


def vocabulary(rows: int = 10, columns: int = 10) -> tuple[str, ...]:
    """Every word that a question, an answer or a told scene can hold, each once, always in the same order."""
    facts = [word for question, answer in FACTS.items() for word in (*question.split(), answer)]
    every = [*FORM, *COLOURS, *KINDS, *COUNTS, *HORIZONTAL, *VERTICAL]
    every += [*row_words(rows), *column_words(columns), *facts]
    return tuple(dict.fromkeys(every))
