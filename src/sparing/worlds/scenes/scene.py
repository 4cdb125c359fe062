"""Scenes: coloured shapes, letters and spelled words on a grid of patches, and what is in each patch."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sparing.worlds.scenes.words import (
    COLOUR_WORDS,
    KINDS,
    LETTERS,
    LEXICON,
    NOTHING,
    SHAPES,
    column_words,
    row_words,
)
from sparing.worlds.splits import Split, split_of

MOST_COUNTED = 4


@dataclass(frozen=True)
class SceneSpec:
    """What scenes look like.

    Attributes:
        rows: patches from top to bottom.
        columns: patches from left to right.
        patch: side of a patch, in pixels.
        objects: fewest and most objects of a scene, the letters of a spelled word not counted.
        letters: share of letters among the objects; the others are shapes.
        word: share of scenes in which a word is spelled.
        colour_noise: by how much an object's or background's RGB value may be off, at most, of 255.
        pixel_noise: standard deviation of each pixel's own noise, of 255.
    """

    rows: int = 10
    columns: int = 10
    patch: int = 8
    objects: tuple[int, int] = (1, 6)
    letters: float = 0.35
    word: float = 0.35
    colour_noise: int = 12
    pixel_noise: float = 4.0

    def __post_init__(self) -> None:
        """Refuse scenes that cannot be drawn.

        Raises:
            ValueError: no room for the objects and a word, or patches too small to tell letters apart.
        """
        low, high = self.objects
        # A word takes three patches and keeps its two neighbours bare.
        room = self.rows * self.columns - (5 if self.word else 0)
        if not 0 <= low <= high <= room:
            raise ValueError(
                f"expected 0 <= fewest <= most <= {room} objects on {self.rows}x{self.columns} patches, got {self.objects}: "
                "choose fewer objects or a larger grid"
            )
        if self.word and self.columns < 3:
            raise ValueError(f"expected three columns for a word, got {self.columns}: set word=0 or a wider grid")
        if self.patch < 8:
            raise ValueError(f"expected patches of 8 pixels or more, got {self.patch}: letters cannot be told apart")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a picture, in pixels."""
        return self.rows * self.patch, self.columns * self.patch


class Thing(NamedTuple):
    """An object: it fills exactly one patch.

    Attributes:
        row: from the top, from 0.
        column: from the left, from 0.
        colour: a colour word.
        kind: a shape or a letter.
    """

    row: int
    column: int
    colour: str
    kind: str


class Truth(NamedTuple):
    """What is in each patch of a scene, all `[rows columns]` int64.

    Attributes:
        thing: which object of the scene (its place in `Scene.things`); -1 where there is none.
        colour: index into `COLOUR_WORDS`: the object's colour, or the background's where there is no object.
        kind: index into `KINDS`; 0 where there is no object.
    """

    thing: np.ndarray
    colour: np.ndarray
    kind: np.ndarray


@dataclass(frozen=True)
class Scene:
    """A scene: everything that a picture shows and a text tells.

    Attributes:
        spec: the kind of scene.
        background: a colour word.
        things: the objects, in reading order.
        word: the spelled word, if there is one; its letters are among the objects.
        look: seed of the picture's accidents: offsets, sizes, noise.
    """

    spec: SceneSpec
    background: str
    things: tuple[Thing, ...]
    word: str | None = None
    look: int = 0

    @property
    def key(self) -> str:
        """What the scene is, whatever its picture's accidents; decides the split."""
        return " ".join([self.background, *("{}/{}/{}/{}".format(*thing) for thing in self.things)])

    def truth(self) -> Truth:
        """What is in each patch."""
        shape = (self.spec.rows, self.spec.columns)
        thing = np.full(shape, -1, dtype=np.int64)
        colour = np.full(shape, COLOUR_WORDS.index(self.background), dtype=np.int64)
        kind = np.zeros(shape, dtype=np.int64)
        for number, (row, column, colour_word, kind_word) in enumerate(self.things):
            thing[row, column] = number
            colour[row, column] = COLOUR_WORDS.index(colour_word)
            kind[row, column] = KINDS.index(kind_word)
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


def draw_scene(rng: np.random.Generator, spec: SceneSpec, split: Split | None = None) -> Scene:
    """Draws one scene, of a split if one is named.

    Each scene has a theme, a colour or shape that zero to four of its objects share and no other has: so counts
    from zero to four are about equally frequent.
    """
    while split_of((scene := _draft(rng, spec)).key) != split and split is not None:
        pass
    return scene


def stream(split: Split, seed: int, spec: SceneSpec | None = None) -> Iterator[Scene]:
    """Yields scenes without end; the same seed gives the same scenes."""
    rng, spec = np.random.default_rng([seed, _SPLIT_SEEDS[split]]), spec or SceneSpec()
    while True:
        yield draw_scene(rng, spec, split)


_SPLIT_SEEDS: dict[Split, int] = {"train": 0, "validation": 1, "test": 2}


def _draft(rng: np.random.Generator, spec: SceneSpec) -> Scene:
    background = _pick(rng, COLOUR_WORDS)
    palette = [colour for colour in COLOUR_WORDS if colour != background]
    free = [(row, column) for row in range(spec.rows) for column in range(spec.columns)]
    things: list[Thing] = []
    word = None
    if spec.word and rng.random() < spec.word:
        word, colour = _pick(rng, LEXICON), _pick(rng, palette)
        row, column = int(rng.integers(spec.rows)), int(rng.integers(spec.columns - 2))
        things += [Thing(row, column + place, colour, letter) for place, letter in enumerate(word)]
        # Bare patches on both sides, so that it is clear where the word begins and ends.
        free = [cell for cell in free if not (cell[0] == row and column - 1 <= cell[1] <= column + 3)]
    low, high = spec.objects
    number = int(rng.integers(low, high + 1))
    by_colour = rng.random() < 0.5
    theme = _pick(rng, palette if by_colour else SHAPES)
    themed = int(rng.integers(min(MOST_COUNTED, number) + 1))
    colours = [colour for colour in palette if colour != theme]
    shapes = [shape for shape in SHAPES if shape != theme]
    for place, cell in enumerate(rng.choice(len(free), size=number, replace=False)):
        is_letter = rng.random() < spec.letters
        colour, kind = _pick(rng, colours), _pick(rng, LETTERS if is_letter else shapes)
        if place < themed:
            colour, kind = (theme, kind) if by_colour else (colour, theme)
        row, column = free[cell]
        things.append(Thing(row, column, colour, kind))
    return Scene(spec, background, tuple(sorted(things)), word, int(rng.integers(2**31)))


def _pick(rng: np.random.Generator, items):
    return items[int(rng.integers(len(items)))]
