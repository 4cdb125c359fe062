"""Questions about scenes, whose truth is known patch by patch: what a zoo model is asked in studies."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from sparing.anatomy import ask
from sparing.evaluate import statistics
from sparing.evaluate.names import nearest
from sparing.evaluate.task import Figure, NotApplicable, Outcome, Progress, Subject, Task
from sparing.evaluate.tasks.metering import Batches, Meter, check_batch
from sparing.evaluate.tasks.writing import Written, as_figure, write
from sparing.worlds.grids import BlindGuesser, Example, GridWorld, chance
from sparing.worlds.opening import scene_files, scene_world

# Answers that the drill-down shows whole.
SHOWN = 20
# Questions of the training split, for each one asked, that the blind guesser is told the answers of; at most so many a task.
TOLD, MOST_TOLD = 30, 1500


@dataclasses.dataclass(frozen=True)
class ScenesTask(Task):
    """Questions about scenes (`sparing.worlds.scenes`), answered in the world's own words; exact match of the whole answer.

    Figures: `accuracy` over all questions, then one for each task of the world, by its name. Chance and what can be answered
    blind are in the details.

    Attributes:
        tasks: which of the world's tasks; all by default.
        per_task: questions of each, every one about a scene of its own.
        split: `validation` to choose by, `test` to report.
        draw: seed of the scenes and questions.
        batch: rows of a batch; `auto` halves them when memory runs out.
        data: a folder of real digits and photographs to make the scenes of (`sparing.worlds.real_scenes`); drawn ones by default.
    """

    tasks: tuple[str, ...] = ()
    per_task: int = 50
    split: Literal["validation", "test"] = "test"
    draw: int = 1
    batch: int | Literal["auto"] = "auto"
    data: Path | None = None

    def check(self) -> None:
        """Look at the settings."""
        check_batch(self.batch)
        if self.per_task < 1:
            raise ValueError(f"per_task={self.per_task}: expected at least 1")
        for task in self.tasks or self.world.tasks:
            if task not in self.world.tasks:
                raise ValueError(f"no task of the scenes is called {task!r}{nearest(task, self.world.tasks)}")

    @property
    def world(self) -> GridWorld:
        """Whose scenes they are."""
        return scene_world(self.data)

    def files(self) -> tuple[Path, ...]:
        """What the scenes are made of."""
        return scene_files(self.data)

    def work(self, subject: Subject) -> float | None:
        """Tokens of pictures and questions."""
        return float(self.per_task * len(self.tasks or self.world.tasks) * 110)

    def measure(self, subject: Subject, *, seed: int, on_step: Progress | None = None) -> Outcome:
        """Ask, and compare with the truth."""
        self.check()
        tell = on_step or (lambda done, word: None)
        world = self.world
        check_speaks(subject, world)
        asked = world.examples(self.split, self.per_task, seed=self.draw, tasks=self.tasks or None)
        written: list[Written] = []
        with subject.applied() as run:
            meter = Meter(run, subject.model)

            def work(part: Sequence[Example]) -> list[Written]:
                inputs: dict[str, Any] = asked_of(subject, world, part)
                ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
                return write(subject.model, subject.tokenizer, meter, ids, mask, max_new_tokens=4, **inputs)

            for part, found in Batches(self.batch, meter.device).run(asked, work):
                written += found
                tell(len(written) / len(asked), f"{len(written)} of {len(asked)} answers" + f" ({len(part)} at once)")
        said = [subject.tokenizer.decode(list(w.ids), skip_special_tokens=True).strip() for w in written]
        return _outcome(asked, said, meter, _blind(world, self.tasks, min(TOLD * self.per_task, MOST_TOLD)))


def check_speaks(subject: Subject, world: GridWorld) -> None:
    """Refuse a model that does not know the words of a world's scenes.

    Raises:
        NotApplicable: see above.
    """
    if strange := world.strange_words(subject.tokenizer.get_vocab()):
        raise NotApplicable(
            f"the model's tokenizer has no word {strange[0]!r}: questions about scenes are for models trained on that world"
        )


def asked_of(subject: Subject, world: GridWorld, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Pictures and questions as the model takes them, one question a row."""
    pictures = [[world.picture(example.scene)] for example in examples]
    return ask(subject.model, subject.processor, [example.question.text for example in examples], pictures)


@functools.cache
def _blind(world: GridWorld, tasks: tuple[str, ...], told: int) -> BlindGuesser:
    return BlindGuesser(world.examples("train", told, seed=1, tasks=tasks or None))


def _outcome(asked: Sequence[Example], said: Sequence[str], meter: Meter, blind: BlindGuesser) -> Outcome:
    marks: dict[str, dict[str, float]] = {"accuracy": {}}
    guessed: dict[str, list[bool]] = {}
    for i, (example, answer) in enumerate(zip(asked, said, strict=True)):
        question = example.question
        right = float(answer == question.answer)
        marks["accuracy"][f"{i}"] = right
        marks.setdefault(question.task, {})[f"{i}"] = right
        guessed.setdefault(question.task, []).append(blind.answer(question) == question.answer)
    figures: dict[str, Figure] = {
        name: as_figure(statistics.share(int(sum(scores.values())), len(scores)), "higher", "share")
        for name, scores in marks.items()
    }
    shown: list[dict[str, Any]] = [
        {"item": f"{i}", "prompt": e.question.text, "gold": e.question.answer, "answer": answer}
        for i, (e, answer) in enumerate(zip(asked[:SHOWN], said, strict=False))
    ]
    details = {
        "chance": chance(asked),
        "blind": {task: sum(right) / len(right) for task, right in guessed.items()},
        "answers": shown,
        "cost": meter.details(),
    }
    return Outcome({**figures, **meter.figures()}, marks, details)
