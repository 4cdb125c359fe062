"""How the patch benchmark speaks: its words and questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any


@dataclasses.dataclass(frozen=True)
class Wording:
    """Words and questions of a benchmark.

    Questions may hold `{colour}`, `{object}` and `{objects}`: of the (first) object, its plural by `plurals`.

    Attributes:
        objects: names of shapes, of those that are drawn: circle, square, triangle, diamond, cross, ring.
        colours: names of colours, of those that are drawn: red, green, blue, yellow, purple, orange.
        characters: letters and digits; drawn as capitals.
        numbers: names of one, two, three, ...
        grounds: names of plain backgrounds, of those that are drawn: black, white.
        ask_object: which shape is it?
        ask_colour: which colour has it?
        ask_count: how many are there?
        ask_character: which letter or digit is it?
        plurals: plurals that are more than an s.
        same: other spellings of an answer, by answer.
    """

    objects: tuple[str, ...]
    colours: tuple[str, ...]
    characters: tuple[str, ...]
    numbers: tuple[str, ...]
    grounds: tuple[str, ...]
    ask_object: str
    ask_colour: str
    ask_count: str
    ask_character: str
    plurals: Mapping[str, str] = dataclasses.field(default_factory=dict)
    same: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def plural(self, word: str) -> str:
        """Several of it."""
        return self.plurals.get(word, word + "s")

    def spellings(self, word: str) -> tuple[str, ...]:
        """An answer and its other spellings."""
        return (word, *self.same.get(word, ()))

    def texts(self) -> Iterable[str]:
        """Everything that it may say."""
        yield from (*self.objects, *self.colours, *self.characters, *self.numbers)
        for question in (self.ask_object, self.ask_colour, self.ask_count, self.ask_character):
            yield from (
                question.format(colour=self.colours[0], object=name, objects=self.plural(name)) for name in self.objects
            )

    def known_to(self, tokenizer: Any) -> bool:
        """Whether a tokenizer has all of its words: a closed vocabulary often has not."""
        unknown = tokenizer.unk_token_id
        return unknown is None or not any(
            unknown in tokenizer(text, add_special_tokens=False)["input_ids"] for text in self.texts()
        )


_SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")

ENGLISH = Wording(
    objects=_SHAPES,
    colours=_COLOURS,
    # Without those that look like another one, and A, which is a word.
    characters=tuple("BCDEFGHJKLMNPRSTUVXYZ2345679"),
    numbers=("one", "two", "three", "four"),
    grounds=("black", "white"),
    ask_object="What shape is in the picture: a circle, a square, a triangle, a diamond, a cross or a ring? Answer with one word.",
    ask_colour="What colour is the {object}? Answer with one word.",
    ask_count="How many {objects} are in the picture? Answer with one number.",
    ask_character="Which letter or digit is in the picture? Answer with it alone.",
    plurals=MappingProxyType({"cross": "crosses"}),
    same=MappingProxyType(
        {"one": ("1",), "two": ("2",), "three": ("3",), "four": ("4",), "diamond": ("rhombus",), "ring": ("donut",)}
    ),
)
"""Plain English."""

SCENES = Wording(
    objects=_SHAPES,
    colours=_COLOURS,
    characters=tuple("abcdeghilnoprstu"),
    numbers=("one", "two", "three", "four"),
    grounds=("black", "white"),
    ask_object="what shape is {colour} ?",
    ask_colour="what colour is {object} ?",
    ask_count="how many {object} ?",
    ask_character="what letter is {colour} ?",
)
"""The forms of the scenes that the zoo's `scenes-llava` was trained on: it knows no others."""


def wording_for(tokenizer: Any) -> Wording:
    """The wording that a tokenizer has all words of: English, or else that of the scenes.

    Raises:
        ValueError: neither.
    """
    for wording in (ENGLISH, SCENES):
        if wording.known_to(tokenizer):
            return wording
    raise ValueError(
        "the tokenizer has a closed vocabulary, which lacks words of plain English and of the scenes: "
        "give a Wording in its own words"
    )
