"""Words that every world on a grid speaks: colours, numbers, places."""

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

COLOUR_WORDS = tuple(COLOURS)
COUNTS = ("zero", "one", "two", "three", "four")
HORIZONTAL = ("left", "right")
VERTICAL = ("above", "below")
NOTHING = "nothing"

COLOUR_FACTS: Mapping[str, str] = MappingProxyType(
    {
        "what colour is grass ?": "green",
        "what colour is snow ?": "white",
        "what colour is coal ?": "black",
        "what colour is sky ?": "blue",
        "what colour is blood ?": "red",
        "what colour is lemon ?": "yellow",
    }
)
SUMS: Mapping[str, str] = MappingProxyType(
    {
        f"what is {COUNTS[one]} plus {COUNTS[other]} ?": COUNTS[one + other]
        for one in range(5)
        for other in range(5 - one)
    }
)


def row_words(rows: int) -> tuple[str, ...]:
    """The words of the rows of a grid, top to bottom: `r1`, `r2`, ..."""
    return tuple(f"r{row + 1}" for row in range(rows))


def column_words(columns: int) -> tuple[str, ...]:
    """The words of the columns of a grid, left to right: `c1`, `c2`, ..."""
    return tuple(f"c{column + 1}" for column in range(columns))
