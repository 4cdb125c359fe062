"""Questions about scenes on a grid, their answers, and how often someone is right who does not look."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from sparing.worlds.grids.scene import MOST_COUNTED, GridScene, Thing
from sparing.worlds.grids.words import COLOUR_WORDS, COUNTS, HORIZONTAL, VERTICAL, column_words, row_words

T = TypeVar("T")
COUNT_WEIGHTS = (1.0, 1.0, 2.0, 4.0, 8.0)


class Question(NamedTuple):
    """A question about a scene.

    Attributes:
        task: one of the world's tasks.
        text: the question, words separated by spaces, the last one `?`.
        answer: one or two words.
        guess: how often someone is right who knows the form of the answer and draws one.
    """

    task: str
    text: str
    answer: str
    guess: float


Asker = Callable[[Any, np.random.Generator], Question | None]
"""Draws a question of one task about a scene; `None` if the scene has nothing that it could ask for."""


@dataclass(frozen=True)
class Example:
    """A scene and one question about it."""

    scene: Any
    question: Question

    @property
    def difficulty(self) -> int:
        """How many objects the scene has, letters of a word included."""
        return len(self.scene.things)


class BlindGuesser:
    """Answers without the picture as well as can be: each question's most frequent answer in the examples it was shown."""

    def __init__(self, shown: Iterable[Example]):
        by_text: dict[str, Counter[str]] = defaultdict(Counter)
        by_task: dict[str, Counter[str]] = defaultdict(Counter)
        for example in shown:
            by_text[example.question.text][example.question.answer] += 1
            by_task[example.question.task][example.question.answer] += 1
        self._by_text, self._by_task = by_text, by_task

    def answer(self, question: Question) -> str:
        """The most frequent answer to this text; to this task, where the text was never shown."""
        seen = self._by_text.get(question.text) or self._by_task[question.task]
        return max(sorted(seen), key=seen.__getitem__) if seen else ""


def chance(asked: Iterable[Example]) -> dict[str, float]:
    """Returns, per task, how often a random answer of the right form is right on these questions."""
    by_task: dict[str, list[float]] = defaultdict(list)
    for example in asked:
        by_task[example.question.task].append(example.question.guess)
    return {task: sum(guesses) / len(guesses) for task, guesses in by_task.items()}


def kind_by_colour(task: str, text: str, kinds: Sequence[str]) -> Asker:
    """What is the only object of a colour, one of `kinds`? `text` has `{colour}` where the colour goes."""

    def asker(scene: GridScene, rng: np.random.Generator) -> Question | None:
        thing = one(rng, [thing for thing in scene.unique_colours().values() if thing.kind in kinds])
        return thing and Question(task, text.format(colour=thing.colour), thing.kind, 1 / len(kinds))

    return asker


def colour(scene: GridScene, rng: np.random.Generator) -> Question | None:
    """Which colour has the only object of its kind?"""
    thing = one(rng, _coloured(scene))
    return thing and Question("colour", f"what colour is {thing.kind} ?", thing.colour, 1 / len(COLOUR_WORDS))


def behind(scene: GridScene, rng: np.random.Generator) -> Question | None:
    """Which colour is behind the only object of its kind?"""
    thing = one(rng, _coloured(scene))
    if thing is None:
        return None
    return Question("behind", f"what colour is behind {thing.kind} ?", scene.background, 1 / len(COLOUR_WORDS))


def background(scene: GridScene, rng: np.random.Generator) -> Question:
    """Which colour has the background?"""
    return Question("background", "what colour is background ?", scene.background, 1 / len(COLOUR_WORDS))


def cell(scene: GridScene, rng: np.random.Generator) -> Question | None:
    """What is in a patch? In 85% of the questions something is."""
    rows, columns = row_words(scene.spec.rows), column_words(scene.spec.columns)
    at = {(thing.row, thing.column): thing.kind for thing in scene.things}
    if at and rng.random() < 0.85:
        row, column = one(rng, list(at)) or (0, 0)
    else:
        row, column = int(rng.integers(len(rows))), int(rng.integers(len(columns)))
    kind = at.get((row, column), scene.kinds[0])
    return Question("cell", f"what is at {rows[row]} {columns[column]} ?", kind, 1 / len(scene.kinds))


def count(words: Sequence[str]) -> Asker:
    """How many objects have one of these colours, or are of one of these kinds? Zero to four."""

    def asker(scene: GridScene, rng: np.random.Generator) -> Question | None:
        times = Counter(thing.colour for thing in scene.things) + Counter(thing.kind for thing in scene.things)
        by_number: dict[int, list[str]] = defaultdict(list)
        for word in words:
            # The background is no object: how often its colour is counted would be the same in every scene.
            if word != scene.background and times[word] <= MOST_COUNTED:
                by_number[times[word]].append(word)
        # Larger numbers are rarer in scenes; asked for more often where they are, they become about as frequent.
        numbers = sorted(by_number)
        weights = np.asarray([COUNT_WEIGHTS[number] for number in numbers])
        number = numbers[int(rng.choice(len(numbers), p=weights / weights.sum()))]
        word = one(rng, by_number[number])
        return Question("count", f"how many {word} ?", COUNTS[number], 1 / len(COUNTS))

    return asker


def relation(scene: GridScene, rng: np.random.Generator) -> Question | None:
    """On which side of an object is another?"""
    named = _named(scene)
    pairs = [
        (name, thing, other_name, other)
        for name, thing in named
        for other_name, other in named
        if thing.row != other.row and thing.column != other.column
    ]
    if not pairs:
        return None
    name, thing, other_name, other = pairs[int(rng.integers(len(pairs)))]
    answer = f"{HORIZONTAL[thing.column > other.column]} {VERTICAL[thing.row > other.row]}"
    return Question("relation", f"where is {name} from {other_name} ?", answer, 1 / 4)


def point(scene: GridScene, rng: np.random.Generator) -> Question | None:
    """In which row and column is an object?"""
    pair = one(rng, _named(scene))
    if pair is None:
        return None
    name, thing = pair
    rows, columns = row_words(scene.spec.rows), column_words(scene.spec.columns)
    answer = f"{rows[thing.row]} {columns[thing.column]}"
    return Question("point", f"where is {name} ?", answer, 1 / (len(rows) * len(columns)))


def blind(facts: Mapping[str, str]) -> Asker:
    """One of these questions, which need no picture."""

    def asker(scene: GridScene, rng: np.random.Generator) -> Question:
        text = list(facts)[int(rng.integers(len(facts)))]
        return Question("blind", text, facts[text], 1 / len(set(facts.values())))

    return asker


def one(rng: np.random.Generator, items: Sequence[T]) -> T | None:
    """Draws one of the items, if there are any."""
    return items[int(rng.integers(len(items)))] if items else None


def _coloured(scene: GridScene) -> list[Thing]:
    """Objects that are the only one of their kind and have a colour: a photograph has none."""
    return [thing for thing in scene.unique_kinds().values() if thing.colour in COLOUR_WORDS]


def _named(scene: GridScene) -> list[tuple[str, Thing]]:
    """Objects that one word names without doubt: by their colour or by their kind."""
    return [*scene.unique_colours().items(), *scene.unique_kinds().items()]
