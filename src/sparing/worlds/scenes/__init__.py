"""The scenes world: pictures of coloured shapes, letters and short words on a grid, with what is in every patch.

A picture is `rows` x `columns` patches; every object fills exactly one of them, a spelled word three in a row. The
truth of a scene says what is in each patch, a scene can also be told in words, and eleven kinds of question have one
right answer each:

    scene = next(scenes.stream("test", seed=0))
    scenes.picture(scene)                # PIL, 80x80
    scene.truth().kind                   # [10 10], indices into scenes.KINDS
    scene.tell()                         # r3 c4 red circle . ...
    scenes.questions(scene, rng, 8)      # what shape is red ? -> circle

A model whose visual tokens are the patches in reading order has patch (row, column) at token `row * columns + column`.
"""

from sparing.worlds.grids import BlindGuesser, Example, Question, Thing, Truth, chance, column_words, row_words
from sparing.worlds.grids.words import COLOUR_WORDS, COLOURS, COUNTS, NOTHING
from sparing.worlds.scenes.painting import paint, picture
from sparing.worlds.scenes.questions import (
    TASKS,
    WORLD,
    ScenesWorld,
    ask,
    draw_scene,
    examples,
    questions,
    single_patch_share,
    stream,
)
from sparing.worlds.scenes.scene import Scene, SceneSpec
from sparing.worlds.scenes.words import FACTS, KINDS, LETTERS, LEXICON, SHAPES, vocabulary

__all__ = [
    "COLOURS",
    "COLOUR_WORDS",
    "COUNTS",
    "FACTS",
    "KINDS",
    "LETTERS",
    "LEXICON",
    "NOTHING",
    "SHAPES",
    "TASKS",
    "WORLD",
    "BlindGuesser",
    "Example",
    "Question",
    "Scene",
    "SceneSpec",
    "ScenesWorld",
    "Thing",
    "Truth",
    "ask",
    "chance",
    "column_words",
    "draw_scene",
    "examples",
    "paint",
    "picture",
    "questions",
    "row_words",
    "single_patch_share",
    "stream",
    "vocabulary",
]
