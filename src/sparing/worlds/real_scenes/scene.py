"""Scenes of real things: handwritten digits in coloured ink and photographs, one in a patch."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sparing.worlds.grids.scene import MOST_COUNTED, GridScene, GridSpec, Thing
from sparing.worlds.grids.words import COLOUR_WORDS
from sparing.worlds.real_scenes.gallery import Gallery
from sparing.worlds.real_scenes.words import CLASSES, COLOURS, DIGITS, KINDS, PHOTO
from sparing.worlds.splits import Split


@dataclass(frozen=True)
class RealSceneSpec(GridSpec):
    """What scenes of real things look like.

    Attributes:
        colour_noise: by how much an ink's or background's RGB value may be off, at most, of 255.
        photos: share of photographs among the objects; the others are digits.
        mirrored: share of photographs that are shown mirrored.
    """

    patch: int = 16
    photos: float = 0.4
    mirrored: float = 0.5

    def __post_init__(self) -> None:
        """Refuse scenes that cannot be drawn.

        Raises:
            ValueError: no room for the objects, or patches too small for a handwritten digit.
        """
        self._refuse_crowds()
        if self.patch < 12:
            raise ValueError(f"expected patches of 12 pixels or more, got {self.patch}: digits cannot be told apart")


@dataclass(frozen=True)
class RealScene(GridScene):
    """A scene of real things: everything that a picture shows and a text tells.

    The colour of a photograph is `photo`.

    Attributes:
        images: which picture each of the things shows: a place in the gallery's digits, or in its photographs.
        look: seed of the picture's accidents: colours, noise, what is mirrored.
    """

    colours: ClassVar[tuple[str, ...]] = COLOURS
    kinds: ClassVar[tuple[str, ...]] = KINDS

    spec: RealSceneSpec
    images: tuple[int, ...] = ()
    look: int = 0


def sketch(
    rng: np.random.Generator, spec: RealSceneSpec, gallery: Gallery, most: int, split: Split | None
) -> RealScene:
    """Draws a scene of at most `most` objects, of pictures of a split of the gallery.

    Each scene has a theme that zero to four of its objects share and no other has: an ink, a digit, a class of
    photographs, or being a photograph. So counts from zero to four are about equally frequent.
    """
    background = _pick(rng, COLOUR_WORDS)
    palette = [colour for colour in COLOUR_WORDS if colour != background]
    number = int(rng.integers(min(spec.objects[0], most), most + 1))
    theme = _pick(rng, _pick(rng, (palette, DIGITS, CLASSES, (PHOTO,))))
    themed = int(rng.integers(min(MOST_COUNTED, number) + 1))
    inks = [colour for colour in palette if colour != theme]
    digits, classes = ([kind for kind in kinds if kind != theme] for kinds in (DIGITS, CLASSES))
    made: list[tuple[Thing, int]] = []
    for place, cell in enumerate(rng.choice(spec.rows * spec.columns, size=number, replace=False)):
        is_photo, ink = theme != PHOTO and rng.random() < spec.photos, _pick(rng, inks)
        kind = _pick(rng, classes if is_photo else digits)
        if place < themed:
            if theme in palette:
                ink, kind = theme, _pick(rng, DIGITS)
            else:
                kind = _pick(rng, CLASSES) if theme == PHOTO else theme
        row, column = divmod(int(cell), spec.columns)
        thing = Thing(row, column, PHOTO if kind in CLASSES else ink, kind)
        made.append((thing, int(_pick(rng, gallery.of(kind, split)))))
    made.sort()
    things, images = tuple(thing for thing, _ in made), tuple(image for _, image in made)
    return RealScene(spec, background, things, images, int(rng.integers(2**31)))


def _pick(rng: np.random.Generator, items):
    return items[int(rng.integers(len(items)))]
