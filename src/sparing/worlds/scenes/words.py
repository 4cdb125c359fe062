"""The words of the scenes world: what is asked, answered and told."""

from collections.abc import Mapping
from types import MappingProxyType

COLOURS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (220, 40, 40),
        "green": (40, 160, 60),
        "blue": (50, 80, 220),
        "yellow": (240, 220, 50),
        "purple": (150, 60, 190),
        "orange": (245, 140, 30),
        "black": (20, 20, 20),
        "white": (245, 245, 245),
    }
)
"""Colour words and their RGB values. Objects and backgrounds share them; an object never has its background's."""

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
LETTERS = tuple("abcdeghilnoprstu")
NOTHING = "nothing"
KINDS = (NOTHING, *SHAPES, *LETTERS)
"""What can stand in a patch. The index is the class of a patch's label; 0 is the bare background."""

COLOUR_WORDS = tuple(COLOURS)
COUNTS = ("zero", "one", "two", "three", "four")
HORIZONTAL = ("left", "right")
VERTICAL = ("above", "below")

LEXICON = (
    "bad", "bag", "bat", "bed", "bet", "big", "bit", "bug",
    "can", "cat", "cob", "cog", "cot", "cub", "cut", "hat",
    "hen", "hid", "hit", "hog", "hot", "hub", "hug", "pan",
    "pen", "pig", "pin", "pot", "rag", "rib", "rod", "run",
)  # fmt: skip
"""Words that are spelled over neighbouring patches, one letter a patch. No letter at one place tells the word."""

FACTS: Mapping[str, str] = MappingProxyType(
    {
        "what colour is grass ?": "green",
        "what colour is snow ?": "white",
        "what colour is coal ?": "black",
        "what colour is sky ?": "blue",
        "what colour is blood ?": "red",
        "what colour is lemon ?": "yellow",
        "how many corners has triangle ?": "three",
        "how many corners has square ?": "four",
        "how many corners has diamond ?": "four",
        "how many corners has circle ?": "zero",
        "how many corners has ring ?": "zero",
        **{
            f"what is {COUNTS[one]} plus {COUNTS[other]} ?": COUNTS[one + other]
            for one in range(5)
            for other in range(5 - one)
        },
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


def row_words(rows: int) -> tuple[str, ...]:
    """The words of the rows of a grid, top to bottom: `r1`, `r2`, ..."""
    return tuple(f"r{row + 1}" for row in range(rows))


def column_words(columns: int) -> tuple[str, ...]:
    """The words of the columns of a grid, left to right: `c1`, `c2`, ..."""
    return tuple(f"c{column + 1}" for column in range(columns))


def vocabulary(rows: int = 10, columns: int = 10) -> tuple[str, ...]:
    """Every word that a question, an answer or a told scene can hold, each once, always in the same order."""
    facts = [word for question, answer in FACTS.items() for word in (*question.split(), answer)]
    every = [*FORM, *COLOUR_WORDS, *KINDS, *COUNTS, *HORIZONTAL, *VERTICAL]
    every += [*row_words(rows), *column_words(columns), *LEXICON, *facts]
    return tuple(dict.fromkeys(every))
