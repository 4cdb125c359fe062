"""The words of the scenes world: what is asked, answered and told."""

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

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
LETTERS = tuple("abcdeghilnoprstu")
KINDS = (NOTHING, *SHAPES, *LETTERS)
"""What can stand in a patch. The index is the class of a patch's label; 0 is the bare background."""

LEXICON = (
    "bad", "bag", "bat", "bed", "bet", "big", "bit", "bug",
    "can", "cat", "cob", "cog", "cot", "cub", "cut", "hat",
    "hen", "hid", "hit", "hog", "hot", "hub", "hug", "pan",
    "pen", "pig", "pin", "pot", "rag", "rib", "rod", "run",
)  # fmt: skip
"""Words that are spelled over neighbouring patches, one letter a patch. No letter at one place tells the word."""

FACTS: Mapping[str, str] = MappingProxyType(
    {
        **COLOUR_FACTS,
        "how many corners has triangle ?": "three",
        "how many corners has square ?": "four",
        "how many corners has diamond ?": "four",
        "how many corners has circle ?": "zero",
        "how many corners has ring ?": "zero",
        **SUMS,
    }
)
"""Questions that need no picture. They are few, and the same in every split: they can only be known by heart."""

FORM = (
    "what",
    "shape",
    "colour",
    "letter",
    "word",
    "is",
    "at",
    "behind",
    "background",
    "how",
    "many",
    "where",
    "from",
    "?",
    ".",
)


def vocabulary(rows: int = 10, columns: int = 10) -> tuple[str, ...]:
    """Every word that a question, an answer or a told scene can hold, each once, always in the same order."""
    facts = [word for question, answer in FACTS.items() for word in (*question.split(), answer)]
    every = [*FORM, *COLOUR_WORDS, *KINDS, *COUNTS, *HORIZONTAL, *VERTICAL]
    every += [*row_words(rows), *column_words(columns), *LEXICON, *facts]
    return tuple(dict.fromkeys(every))
