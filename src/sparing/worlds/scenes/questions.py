"""What is asked about scenes, and the world that they make."""

import dataclasses
from collections.abc import Sequence
from types import MappingProxyType

import numpy as np

from sparing.worlds.grids import GridWorld, Thing
from sparing.worlds.grids import questions as about
from sparing.worlds.grids.questions import Asker, Example, Question
from sparing.worlds.grids.words import COLOUR_WORDS
from sparing.worlds.scenes.painting import paint
from sparing.worlds.scenes.scene import Scene, SceneSpec, sketch
from sparing.worlds.scenes.words import FACTS, KINDS, LETTERS, LEXICON, SHAPES, vocabulary
from sparing.worlds.splits import Split


def _word(scene: Scene, rng: np.random.Generator) -> Question | None:
    return Question("word", "what word ?", scene.word, 1 / len(LEXICON)) if scene.word else None


TASKS: dict[str, Asker] = {
    "shape": about.kind_by_colour("shape", "what shape is {colour} ?", SHAPES),
    "colour": about.colour,
    "letter": about.kind_by_colour("letter", "what letter is {colour} ?", LETTERS),
    "cell": about.cell,
    "background": about.background,
    "behind": about.behind,
    "count": about.count((*COLOUR_WORDS, *SHAPES)),
    "relation": about.relation,
    "point": about.point,
    "word": _word,
    "blind": about.blind(FACTS),
}
"""What is asked, by name: see the zoo's guide for one example each."""


class ScenesWorld(GridWorld):
    """The scenes of a spec as a world to train on and to be measured on."""

    tasks, colours, kinds, facts = TASKS, COLOUR_WORDS, KINDS, FACTS
    groups = MappingProxyType({"shapes": SHAPES, "letters": LETTERS})
    by_colour = ("shape", SHAPES)
    shows = "coloured shapes, letters and spelled words"
    source = "Generated scenes (`sparing.worlds.scenes`), nothing else."
    licence = "Licence: Apache-2.0, for weights and data alike."

    def __init__(self, spec: SceneSpec | None = None):
        self.spec: SceneSpec = spec or SceneSpec()

    def sketch(self, rng: np.random.Generator, most: int, split: Split | None) -> Scene:
        """As in `GridWorld`."""
        return sketch(rng, self.spec, most)

    def exchange(
        self, scene: Scene, thing: Thing, other: Thing, rng: np.random.Generator, split: Split | None
    ) -> Scene:
        """As in `GridWorld`."""
        return dataclasses.replace(scene, things=tuple(other if one == thing else one for one in scene.things))

    def paint(self, scenes: Sequence[Scene]) -> np.ndarray:
        """As in `GridWorld`."""
        return paint(scenes)

    def vocabulary(self) -> tuple[str, ...]:
        """As in `GridWorld`."""
        return vocabulary(self.spec.rows, self.spec.columns)


WORLD = ScenesWorld()
ask, questions = WORLD.ask, WORLD.questions


def draw_scene(rng: np.random.Generator, spec: SceneSpec, split: Split | None = None) -> Scene:
    """Draws one scene, of a split if one is named."""
    return ScenesWorld(spec).draw(rng, split)


def stream(split: Split, seed: int, spec: SceneSpec | None = None):
    """Yields scenes without end; the same seed gives the same scenes."""
    return ScenesWorld(spec).stream(split, seed)


def examples(
    split: Split, per_task: int, seed: int = 0, tasks: Sequence[str] | None = None, spec: SceneSpec | None = None
) -> list[Example]:
    """Draws `per_task` questions of every task: `GridWorld.examples` for scenes of this spec."""
    return ScenesWorld(spec).examples(split, per_task, seed, tasks)


def single_patch_share() -> float:
    """How often someone names the spelled word who sees its most telling letter only (words equally frequent)."""
    return max(len({word[place] for word in LEXICON}) for place in range(3)) / len(LEXICON)
