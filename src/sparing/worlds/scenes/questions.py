"""Questions about scenes, their answers, and how often someone is right who does not look."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from sparing.worlds.scenes.scene import MOST_COUNTED, Scene, SceneSpec, Thing, stream
from sparing.worlds.scenes.words import (
    COLOUR_WORDS,
    COUNTS,
    FACTS,
    HORIZONTAL,
    KINDS,
    LETTERS,
    LEXICON,
    NOTHING,
    SHAPES,
    VERTICAL,
    column_words,
    row_words,
)
from sparing.worlds.splits import Split

T = TypeVar("T")
COUNT_WEIGHTS = (1.0, 1.0, 2.0, 4.0, 8.0)


class Question(NamedTuple):
    """A question about a scene.

    Attributes:
        task: a key of `TASKS`.
        text: the question, words separated by spaces, the last one `?`.
        answer: one or two words.
        guess: how often someone is right who knows the form of the answer and draws one.
    """

    task: str
    text: str
    answer: str
    guess: float


@dataclass(frozen=True)
class Example:
    """A scene and one question about it."""

    scene: Scene
    question: Question

    @property
    def difficulty(self) -> int:
        """How many objects the scene has, letters of a word included."""
        return len(self.scene.things)


Asker = Callable[[Scene, np.random.Generator], Question | None]


def ask(scene: Scene, rng: np.random.Generator, task: str) -> Question | None:
    """Draws a question of a task about a scene; `None` if the scene has nothing that the task could ask for.

    Raises:
        ValueError: `task` is not a key of `TASKS`.
    """
    if task not in TASKS:
        raise ValueError(f"expected one of the tasks {', '.join(TASKS)}, got {task!r}")
    return TASKS[task](scene, rng)


def questions(
    scene: Scene, rng: np.random.Generator, number: int, weights: Sequence[float] | None = None
) -> list[Question]:
    """Draws `number` questions about a scene, no two with the same text if it has enough of them.

    Args:
        scene: what is asked about.
        rng: where the draws come from.
        number: how many.
        weights: of the tasks, in the order of `TASKS`; equal by default.
    """
    tasks = list(TASKS)
    shares = np.asarray(weights if weights is not None else [1.0] * len(tasks), dtype=float)
    order = rng.choice(len(tasks), size=4 * number, p=shares / shares.sum())
    drawn: dict[str, Question] = {}
    repeated: list[Question] = []
    for task in order:
        if len(drawn) == number:
            break
        if (made := TASKS[tasks[task]](scene, rng)) is not None:
            if made.text in drawn:
                repeated.append(made)
            drawn.setdefault(made.text, made)
    while len(drawn) + len(repeated) < number:
        repeated.append(_background(scene, rng))
    return [*drawn.values(), *repeated][:number]


def examples(
    split: Split, per_task: int, seed: int = 0, tasks: Sequence[str] | None = None, spec: SceneSpec | None = None
) -> list[Example]:
    """Draws `per_task` questions of every task, each about a scene of its own, tasks in turn.

    The first examples of a longer list are those of a shorter one with the same seed.

    Raises:
        ValueError: a task is not a key of `TASKS`, or scenes of this spec cannot be asked about it.
    """
    rng = np.random.default_rng([seed, 7])
    scenes = stream(split, seed, spec)
    drawn = []
    for _ in range(per_task):
        for task in tasks or TASKS:
            for scene in (next(scenes) for _ in range(10_000)):
                if (made := ask(scene, rng, task)) is not None:
                    drawn.append(Example(scene, made))
                    break
            else:
                raise ValueError(
                    f"scenes of {spec} hold nothing that {task} could ask for: change the spec or the tasks"
                )
    return drawn


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


def single_patch_share() -> float:
    """How often someone names the spelled word who sees its most telling letter only (words equally frequent)."""
    return max(len({word[place] for word in LEXICON}) for place in range(3)) / len(LEXICON)


def _shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    thing = _one(rng, [thing for thing in scene.unique_colours().values() if thing.kind in SHAPES])
    return thing and Question("shape", f"what shape is {thing.colour} ?", thing.kind, 1 / len(SHAPES))


def _letter(scene: Scene, rng: np.random.Generator) -> Question | None:
    thing = _one(rng, [thing for thing in scene.unique_colours().values() if thing.kind in LETTERS])
    return thing and Question("letter", f"what letter is {thing.colour} ?", thing.kind, 1 / len(LETTERS))


def _colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    thing = _one(rng, list(scene.unique_kinds().values()))
    return thing and Question("colour", f"what colour is {thing.kind} ?", thing.colour, 1 / len(COLOUR_WORDS))


def _behind(scene: Scene, rng: np.random.Generator) -> Question | None:
    thing = _one(rng, list(scene.unique_kinds().values()))
    if thing is None:
        return None
    return Question("behind", f"what colour is behind {thing.kind} ?", scene.background, 1 / len(COLOUR_WORDS))


def _cell(scene: Scene, rng: np.random.Generator) -> Question | None:
    rows, columns = row_words(scene.spec.rows), column_words(scene.spec.columns)
    at = {(thing.row, thing.column): thing.kind for thing in scene.things}
    if at and rng.random() < 0.85:
        row, column = _one(rng, list(at)) or (0, 0)
    else:
        row, column = int(rng.integers(len(rows))), int(rng.integers(len(columns)))
    kind = at.get((row, column), NOTHING)
    return Question("cell", f"what is at {rows[row]} {columns[column]} ?", kind, 1 / len(KINDS))


def _count(scene: Scene, rng: np.random.Generator) -> Question | None:
    times = Counter(thing.colour for thing in scene.things) + Counter(thing.kind for thing in scene.things)
    by_number: dict[int, list[str]] = defaultdict(list)
    for word in (*COLOUR_WORDS, *SHAPES):
        # The background is no object: how often its colour is counted would be the same in every scene.
        if word != scene.background and times[word] <= MOST_COUNTED:
            by_number[times[word]].append(word)
    # Larger numbers are rarer in scenes; asked for more often where they are, they become about as frequent.
    numbers = sorted(by_number)
    weights = np.asarray([COUNT_WEIGHTS[number] for number in numbers])
    number = numbers[int(rng.choice(len(numbers), p=weights / weights.sum()))]
    word = _one(rng, by_number[number])
    return Question("count", f"how many {word} ?", COUNTS[number], 1 / len(COUNTS))


def _relation(scene: Scene, rng: np.random.Generator) -> Question | None:
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


def _point(scene: Scene, rng: np.random.Generator) -> Question | None:
    pair = _one(rng, _named(scene))
    if pair is None:
        return None
    name, thing = pair
    rows, columns = row_words(scene.spec.rows), column_words(scene.spec.columns)
    answer = f"{rows[thing.row]} {columns[thing.column]}"
    return Question("point", f"where is {name} ?", answer, 1 / (len(rows) * len(columns)))


def _word(scene: Scene, rng: np.random.Generator) -> Question | None:
    return Question("word", "what word ?", scene.word, 1 / len(LEXICON)) if scene.word else None


def _blind(scene: Scene, rng: np.random.Generator) -> Question:
    text = list(FACTS)[int(rng.integers(len(FACTS)))]
    return Question("blind", text, FACTS[text], 1 / len(set(FACTS.values())))


def _background(scene: Scene, rng: np.random.Generator) -> Question:
    return Question("background", "what colour is background ?", scene.background, 1 / len(COLOUR_WORDS))


TASKS: dict[str, Asker] = {
    "shape": _shape,
    "colour": _colour,
    "letter": _letter,
    "cell": _cell,
    "background": _background,
    "behind": _behind,
    "count": _count,
    "relation": _relation,
    "point": _point,
    "word": _word,
    "blind": _blind,
}
"""What is asked, by name: see the zoo's guide for one example each."""


def _named(scene: Scene) -> list[tuple[str, Thing]]:
    """Objects that one word names without doubt: by their colour or by their kind."""
    return [*scene.unique_colours().items(), *scene.unique_kinds().items()]


def _one(rng: np.random.Generator, items: Sequence[T]) -> T | None:
    return items[int(rng.integers(len(items)))] if items else None
