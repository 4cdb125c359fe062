"""The real-scenes world: its pictures and what is asked about them."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from sparing.worlds.grids import GridWorld, Question, Thing
from sparing.worlds.grids import questions as about
from sparing.worlds.grids.questions import Asker
from sparing.worlds.grids.words import COLOUR_WORDS
from sparing.worlds.grids.words import COLOURS as RGB
from sparing.worlds.real_scenes.gallery import Gallery
from sparing.worlds.real_scenes.scene import RealScene, RealSceneSpec, sketch
from sparing.worlds.real_scenes.words import CLASSES, COLOURS, DIGITS, FACTS, KINDS, PHOTO, vocabulary
from sparing.worlds.splits import Split


def _photo(scene: RealScene, rng: np.random.Generator) -> Question | None:
    thing = scene.unique_colours().get(PHOTO)
    return thing and Question("photo", "what is in photo ?", thing.kind, 1 / len(CLASSES))


TASKS: Mapping[str, Asker] = MappingProxyType(
    {
        "digit": about.kind_by_colour("digit", "what digit is {colour} ?", DIGITS),
        "photo": _photo,
        "colour": about.colour,
        "cell": about.cell,
        "background": about.background,
        "behind": about.behind,
        "count": about.count((*COLOUR_WORDS, PHOTO, *DIGITS, *CLASSES)),
        "relation": about.relation,
        "point": about.point,
        "blind": about.blind(FACTS),
    }
)
"""What is asked, by name: see the zoo's guide for one example each."""


class RealScenesWorld(GridWorld):
    """Scenes of the pictures of a gallery."""

    tasks, colours, kinds, facts = TASKS, COLOURS, KINDS, FACTS
    groups = MappingProxyType({"digits": DIGITS, "photographs": CLASSES})
    by_colour = ("digit", DIGITS)
    shows = "handwritten digits in coloured ink and photographs"
    source = (
        "Generated scenes (`sparing.worlds.real_scenes`) of real pictures: MNIST's digits and CIFAR-10's photographs. Each of "
        "these\n  pictures belongs to one split, by a hash of its place in its file, and scenes of a split use no others."
    )
    licence = "The weights were made from MNIST and CIFAR-10; whoever passes them on answers for their terms."

    def __init__(self, gallery: Gallery, spec: RealSceneSpec | None = None):
        self.gallery, self.spec = gallery, spec or RealSceneSpec()

    @classmethod
    def open(cls, folder: Path | str, spec: RealSceneSpec | None = None) -> "RealScenesWorld":
        """Opens the data folder that `Gallery.open` describes.

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: a file holds something else.
        """
        return cls(Gallery.open(folder), spec)

    def sketch(self, rng: np.random.Generator, most: int, split: Split | None) -> RealScene:
        """As in `GridWorld`."""
        return sketch(rng, self.spec, self.gallery, most, split)

    def exchange(
        self, scene: RealScene, thing: Thing, other: Thing, rng: np.random.Generator, split: Split | None
    ) -> RealScene:
        """As in `GridWorld`."""
        place, those = scene.things.index(thing), self.gallery.of(other.kind, split)
        things, images = list(scene.things), list(scene.images)
        things[place], images[place] = other, int(those[int(rng.integers(len(those)))])
        return dataclasses.replace(scene, things=tuple(things), images=tuple(images))

    def paint(self, scenes: Sequence[RealScene]) -> np.ndarray:
        """As in `GridWorld`. A picture follows from its scene and the gallery alone."""
        spec = scenes[0].spec
        masks, photos = self.gallery.digit_masks(spec.patch), self.gallery.photo_patches(spec.patch)
        shape = (len(scenes), spec.rows, spec.columns, spec.patch, spec.patch, 3)
        canvas = np.empty(shape, dtype=np.float32)
        for number, scene in enumerate(scenes):
            if scene.spec != spec:
                raise ValueError("expected scenes of one spec, got several: paint them apart")
            rng = np.random.default_rng(scene.look)
            off = rng.integers(-spec.colour_noise, spec.colour_noise + 1, size=(len(scene.things) + 1, 3))
            mirrored = rng.random(len(scene.things)) < spec.mirrored
            ground = np.asarray(RGB[scene.background]) + off[-1]
            canvas[number] = ground
            for place, (thing, image) in enumerate(zip(scene.things, scene.images, strict=True)):
                if thing.colour == PHOTO:
                    patch = photos[image, :, ::-1] if mirrored[place] else photos[image]
                else:
                    mask = masks[image, :, :, None].astype(np.float32) / 255
                    patch = ground * (1 - mask) + (np.asarray(RGB[thing.colour]) + off[place]) * mask
                canvas[number, thing.row, thing.column] = patch
            if spec.pixel_noise:
                canvas[number] += rng.standard_normal(shape[1:], dtype=np.float32) * spec.pixel_noise
        flat = canvas.transpose(0, 1, 3, 2, 4, 5).reshape(len(scenes), *spec.size, 3)
        return np.clip(np.rint(flat), 0, 255).astype(np.uint8)

    def vocabulary(self) -> tuple[str, ...]:
        """As in `GridWorld`."""
        return vocabulary(self.spec.rows, self.spec.columns)
