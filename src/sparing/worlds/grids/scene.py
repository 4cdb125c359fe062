"""A scene on a grid: what is in each of its patches, in numbers and in words."""

import abc
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from sparing.worlds.grids.words import NOTHING, column_words, row_words

MOST_COUNTED = 4


@dataclass(frozen=True)
class GridSpec(abc.ABC):
    """What scenes on a grid look like; each world adds its own.

    Attributes:
        rows: patches from top to bottom.
        columns: patches from left to right.
        patch: side of a patch, in pixels.
        objects: fewest and most objects of a scene.
        colour_noise: by how much an object's or background's RGB value may be off, at most, of 255.
        pixel_noise: standard deviation of each pixel's own noise, of 255.
    """

    rows: int = 10
    columns: int = 10
    patch: int = 8
    objects: tuple[int, int] = (1, 6)
    colour_noise: int = 12
    pixel_noise: float = 4.0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a picture, in pixels."""
        return self.rows * self.patch, self.columns * self.patch

    def _refuse_crowds(self, kept: int = 0) -> None:
        low, high = self.objects
        room = self.rows * self.columns - kept
        if not 0 <= low <= high <= room:
            raise ValueError(
                f"expected 0 <= fewest <= most <= {room} objects on {self.rows}x{self.columns} patches, got {self.objects}: "
                "choose fewer objects or a larger grid"
            )


class Thing(NamedTuple):
    """An object: it fills exactly one patch.

    Attributes:
        row: from the top, from 0.
        column: from the left, from 0.
        colour: a word of the scene's `colours`.
        kind: a word of the scene's `kinds`, such as a shape or a letter.
    """

    row: int
    column: int
    colour: str
    kind: str


class Truth(NamedTuple):
    """What is in each patch of a scene, all `[rows columns]` int64.

    Attributes:
        thing: which object of the scene (its place in `things`); -1 where there is none.
        colour: index into the scene's `colours`: the object's colour, or the background's where there is no object.
        kind: index into the scene's `kinds`; 0 where there is no object.
    """

    thing: np.ndarray
    colour: np.ndarray
    kind: np.ndarray


@dataclass(frozen=True)
class GridScene(abc.ABC):
    """Everything that a picture shows and a text tells; each world adds its own.

    Attributes:
        colours: colour words, objects' and backgrounds'.
        kinds: what can stand in a patch; the first is nothing, the bare background.
        spec: the kind of scene.
        background: a colour word.
        things: the objects, in reading order.
    """

    colours: ClassVar[tuple[str, ...]]
    kinds: ClassVar[tuple[str, ...]]

    spec: Any
    background: str
    things: tuple[Thing, ...]

    @property
    def key(self) -> str:
        """What the scene is, whatever its picture's accidents; decides the split."""
        return " ".join([self.background, *("{}/{}/{}/{}".format(*thing) for thing in self.things)])

    def truth(self) -> Truth:
        """What is in each patch."""
        shape = (self.spec.rows, self.spec.columns)
        thing = np.full(shape, -1, dtype=np.int64)
        colour = np.full(shape, self.colours.index(self.background), dtype=np.int64)
        kind = np.zeros(shape, dtype=np.int64)
        for number, (row, column, colour_word, kind_word) in enumerate(self.things):
            thing[row, column] = number
            colour[row, column] = self.colours.index(colour_word)
            kind[row, column] = self.kinds.index(kind_word)
        return Truth(thing, colour, kind)

    def patch_words(self) -> list[tuple[str, str, str, str]]:
        """Row, column, colour and kind word of every patch, in reading order (as visual tokens come)."""
        at = {(thing.row, thing.column): thing for thing in self.things}
        words = []
        for row, row_word in enumerate(row_words(self.spec.rows)):
            for column, column_word in enumerate(column_words(self.spec.columns)):
                thing = at.get((row, column))
                colour, kind = (thing.colour, thing.kind) if thing else (self.background, NOTHING)
                words.append((row_word, column_word, colour, kind))
        return words

    def tell(self) -> str:
        """The scene in words: `red background . r3 c4 blue circle . ...`: the background, then place and look of each object."""
        rows, columns = row_words(self.spec.rows), column_words(self.spec.columns)
        told = [f"{self.background} background ."]
        told += [f"{rows[thing.row]} {columns[thing.column]} {thing.colour} {thing.kind} ." for thing in self.things]
        return " ".join(told)

    def unique_colours(self) -> dict[str, Thing]:
        """Colours that exactly one object has -> that object."""
        times = Counter(thing.colour for thing in self.things)
        return {thing.colour: thing for thing in self.things if times[thing.colour] == 1}

    def unique_kinds(self) -> dict[str, Thing]:
        """Kinds of which there is exactly one object -> that object."""
        times = Counter(thing.kind for thing in self.things)
        return {thing.kind: thing for thing in self.things if times[thing.kind] == 1}
