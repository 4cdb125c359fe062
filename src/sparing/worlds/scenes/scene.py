"""Scenes: coloured shapes, letters and spelled words on a grid of patches, and what is in each patch."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sparing.worlds.grids.scene import MOST_COUNTED, GridScene, GridSpec, Thing
from sparing.worlds.grids.words import COLOUR_WORDS
from sparing.worlds.scenes.words import KINDS, LETTERS, LEXICON, SHAPES


@dataclass(frozen=True)
class SceneSpec(GridSpec):
    """What scenes look like.

    Attributes:
        objects: fewest and most objects of a scene, the letters of a spelled word not counted.
        letters: share of letters among the objects; the others are shapes.
        word: share of scenes in which a word is spelled.
    """

    letters: float = 0.35
    word: float = 0.35

    def __post_init__(self) -> None:
        """Refuse scenes that cannot be drawn.

        Raises:
            ValueError: no room for the objects and a word, or patches too small to tell letters apart.
        """
        # A word takes three patches and keeps its two neighbours bare.
        self._refuse_crowds(kept=5 if self.word else 0)
        if self.word and self.columns < 3:
            raise ValueError(f"expected three columns for a word, got {self.columns}: set word=0 or a wider grid")
        if self.patch < 8:
            raise ValueError(f"expected patches of 8 pixels or more, got {self.patch}: letters cannot be told apart")


@dataclass(frozen=True)
class Scene(GridScene):
    """A scene: everything that a picture shows and a text tells.

    Attributes:
        word: the spelled word, if there is one; its letters are among the objects.
        look: seed of the picture's accidents: offsets, sizes, noise.
    """

    colours: ClassVar[tuple[str, ...]] = COLOUR_WORDS
    kinds: ClassVar[tuple[str, ...]] = KINDS

    spec: SceneSpec
    word: str | None = None
    look: int = 0


def sketch(rng: np.random.Generator, spec: SceneSpec, most: int) -> Scene:
    """Draws a scene of at most `most` objects, the letters of a word not counted.

    Each scene has a theme, a colour or shape that zero to four of its objects share and no other has: so counts
    from zero to four are about equally frequent.
    """
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
    number = int(rng.integers(min(spec.objects[0], most), most + 1))
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
