"""What worlds of pictures on a grid have in common: things that fill one patch each, and questions about them.

`GridWorld` is what a model is trained and measured on; `sparing.worlds.scenes` and `sparing.worlds.real_scenes` are two.
"""

from sparing.worlds.grids.questions import BlindGuesser, Example, Question, chance
from sparing.worlds.grids.scene import GridScene, GridSpec, Thing, Truth
from sparing.worlds.grids.words import column_words, row_words
from sparing.worlds.grids.world import GridWorld

__all__ = [
    "BlindGuesser",
    "Example",
    "GridScene",
    "GridSpec",
    "GridWorld",
    "Question",
    "Thing",
    "Truth",
    "chance",
    "column_words",
    "row_words",
]
