"""`GridWorld`: what a model that looks at grids is trained and measured on, whatever is drawn in the patches."""

import abc
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from sparing.worlds.grids.questions import Asker, Example, Question, background
from sparing.worlds.grids.scene import Thing
from sparing.worlds.grids.words import column_words, row_words
from sparing.worlds.splits import Split, split_of

SPLIT_SEEDS: dict[Split, int] = {"train": 0, "validation": 1, "test": 2}


class GridWorld(abc.ABC):
    """Scenes of one kind: drawn, painted and asked about.

    Attributes:
        spec: what the scenes look like, a `GridSpec`.
        tasks: what is asked, by name.
        colours: colour words, as `Truth.colour` counts them.
        kinds: what can stand in a patch, as `Truth.kind` counts them; the first is nothing.
        groups: kinds by what they are, such as letters.
        by_colour: a task that asks for the kind of the only object of a colour, and the kinds that it can be.
        facts: questions that need no picture, and their answers.
        shows: what a picture is a grid of, in words.
        source: what the data is, in a sentence.
        licence: of what is made from it, in a sentence.
    """

    spec: Any
    tasks: Mapping[str, Asker]
    colours: tuple[str, ...]
    kinds: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]]
    by_colour: tuple[str, tuple[str, ...]]
    facts: Mapping[str, str]
    shows: str
    source: str
    licence: str

    @abc.abstractmethod
    def sketch(self, rng: np.random.Generator, most: int, split: Split | None) -> Any:
        """Draws a scene of at most `most` objects, of whatever split; pictures in it, if any, are of `split`."""

    @abc.abstractmethod
    def exchange(self, scene: Any, thing: Thing, other: Thing, rng: np.random.Generator, split: Split | None) -> Any:
        """Returns a scene with `other` at the place of `thing` and nothing else changed; its picture, if any, is of `split`."""

    @abc.abstractmethod
    def paint(self, scenes: Sequence[Any]) -> np.ndarray:
        """Paints scenes of one spec; returns `[n height width 3]` uint8."""

    @abc.abstractmethod
    def vocabulary(self) -> tuple[str, ...]:
        """Every word that a question, an answer or a told scene can hold, each once, always in the same order."""

    def strange_words(self, known: Container[str]) -> list[str]:
        """Words of the vocabulary that are not among those that a model knows."""
        return [word for word in self.vocabulary() if word not in known]

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """The words that `patch_words` tells each patch in, by part: row, column, colour, kind."""
        rows, columns = row_words(self.spec.rows), column_words(self.spec.columns)
        return {"row": rows, "column": columns, "colour": self.colours, "kind": self.kinds}

    def draw(self, rng: np.random.Generator, split: Split | None = None, most: int | None = None) -> Any:
        """Draws one scene, of a split if one is named, with at most `most` objects if that is given."""
        limit: int = self.spec.objects[1] if most is None else most
        while split_of((scene := self.sketch(rng, limit, split)).key) != split and split is not None:
            pass
        return scene

    def stream(self, split: Split, seed: int) -> Iterator[Any]:
        """Yields scenes without end; the same seed gives the same scenes."""
        rng = np.random.default_rng([seed, SPLIT_SEEDS[split]])
        while True:
            yield self.draw(rng, split)

    def picture(self, scene: Any) -> Image.Image:
        """Paints one scene, as the picture that a processor takes."""
        return Image.fromarray(self.paint([scene])[0])

    def ask(self, scene: Any, rng: np.random.Generator, task: str) -> Question | None:
        """Draws a question of a task about a scene; `None` if the scene has nothing that the task could ask for.

        Raises:
            ValueError: the world has no such task.
        """
        if task not in self.tasks:
            raise ValueError(f"expected one of the tasks {', '.join(self.tasks)}, got {task!r}")
        return self.tasks[task](scene, rng)

    def questions(
        self,
        scene: Any,
        rng: np.random.Generator,
        number: int,
        weights: Sequence[float] | None = None,
        *,
        distinct: bool = True,
    ) -> list[Question]:
        """Draws `number` questions about a scene, no two with the same text if it has enough of them.

        Distinct questions shift the answers: of several counts in a scene the last are those of what it hardly holds.

        Args:
            scene: what is asked about.
            rng: where the draws come from.
            number: how many.
            weights: of the tasks, in their order; equal by default.
            distinct: ask nothing twice; otherwise each question is drawn as if it were the only one.
        """
        tasks = list(self.tasks)
        shares = np.asarray(weights if weights is not None else [1.0] * len(tasks), dtype=float)
        order = rng.choice(len(tasks), size=4 * number, p=shares / shares.sum())
        drawn: list[Question] = []
        repeated: list[Question] = []
        asked: set[str] = set()
        for task in order:
            if len(drawn) == number:
                break
            if (made := self.tasks[tasks[task]](scene, rng)) is not None:
                (repeated if distinct and made.text in asked else drawn).append(made)
                asked.add(made.text)
        while len(drawn) + len(repeated) < number:
            repeated.append(background(scene, rng))
        return [*drawn, *repeated][:number]

    def examples(self, split: Split, per_task: int, seed: int = 0, tasks: Sequence[str] | None = None) -> list[Example]:
        """Draws `per_task` questions of every task, each about a scene of its own, tasks in turn.

        The first examples of a longer list are those of a shorter one with the same seed.

        Raises:
            ValueError: the world has no such task, or its scenes cannot be asked about it.
        """
        rng = np.random.default_rng([seed, 7])
        scenes = self.stream(split, seed)
        drawn = []
        for _ in range(per_task):
            for task in tasks or self.tasks:
                for scene in (next(scenes) for _ in range(10_000)):
                    if (made := self.ask(scene, rng, task)) is not None:
                        drawn.append(Example(scene, made))
                        break
                else:
                    raise ValueError(
                        f"scenes of {self.spec} hold nothing that {task} could ask for: change the spec or the tasks"
                    )
        return drawn
