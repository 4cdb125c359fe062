"""Does the answer follow the patch? One visual token of a scene replaced by that of a scene in which its object is another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparing.ablate import replace
from sparing.evaluate import statistics
from sparing.evaluate.task import NotApplicable, Outcome, Progress, Subject, Task
from sparing.evaluate.tasks.scenes import asked_of, check_speaks
from sparing.evaluate.tasks.writing import as_figure
from sparing.execute import apply
from sparing.lens import record
from sparing.tokens import Group, TokenMap
from sparing.worlds.grids import Example, GridScene, GridWorld, Question, column_words, row_words
from sparing.worlds.grids.words import COLOUR_WORDS
from sparing.worlds.opening import scene_files, scene_world

AT_ONCE = 25
QUESTIONS = 3


class Pair(NamedTuple):
    """Two scenes that differ in one object, and a question whose answer holds in the second alone.

    Attributes:
        scene: the one that is shown.
        donor: the one whose patch is put in.
        cell: the object's patch, counted in reading order.
        bare: another patch, bare in both.
        question: about the donor's object, which the shown scene does not have.
    """

    scene: GridScene
    donor: GridScene
    cell: int
    bare: int
    question: Question


@dataclasses.dataclass(frozen=True)
class SceneTransplantTask(Task):
    """Whether answers follow single visual tokens: token swap, with what each patch shows known.

    Two pictures differ in one object. The projector's output for its patch, in the second picture, takes the place of that in the
    first; then the object of the second is asked about. Figures, shares of answers that say what the second picture shows:
    `answer follows the patch`; `without the transplant` (chance and bias: the object asked about is not there); `with a bare patch`
    (a control: another token of the second picture is put in instead); `second picture itself` (the most that can be reached);
    and the first by what is asked.

    Attributes:
        per_kind: pairs for each of colour, kind and place.
        split: `validation` or `test`.
        draw: seed of the scenes.
        data: a folder of real digits and photographs to make the scenes of; drawn ones by default.
    """

    per_kind: int = 40
    split: Literal["validation", "test"] = "test"
    draw: int = 1
    data: Path | None = None

    def check(self) -> None:
        """Look at the settings."""
        scene_world(self.data)
        if self.per_kind < 1:
            raise ValueError(f"per_kind={self.per_kind}: expected at least 1")

    def files(self) -> tuple[Path, ...]:
        """What the scenes are made of."""
        return scene_files(self.data)

    def work(self, subject: Subject) -> float | None:
        """Tokens of pictures and questions: each pair is answered four times and recorded once."""
        return float(5 * QUESTIONS * self.per_kind * 110)

    def measure(self, subject: Subject, *, seed: int, on_step: Progress | None = None) -> Outcome:
        """Put patches in, and ask."""
        self.check()
        world = scene_world(self.data)
        check_speaks(subject, world)
        tell = on_step or (lambda done, word: None)
        pairs = drawn_pairs(world, self.split, self.per_kind, self.draw)
        marks: dict[str, dict[str, float]] = {
            "answer follows the patch": {},
            "without the transplant": {},
            "with a bare patch": {},
            "second picture itself": {},
        }
        for start in range(0, len(pairs), AT_ONCE):
            part = pairs[start : start + AT_ONCE]
            for what, answers in zip(marks, _answers(subject, world, part), strict=True):
                for i, (pair, answer) in enumerate(zip(part, answers, strict=True), start):
                    marks[what][str(i)] = float(answer == pair.question.answer)
            tell((start + len(part)) / len(pairs), f"{start + len(part)} of {len(pairs)} pairs")
        follows = marks["answer follows the patch"]
        for kind in dict.fromkeys(pair.question.task for pair in pairs):
            marks[f"answer follows the patch, {kind}"] = {
                str(i): follows[str(i)] for i, pair in enumerate(pairs) if pair.question.task == kind
            }
        figures = {
            name: as_figure(statistics.share(int(sum(items.values())), len(items)), "higher", "share")
            for name, items in marks.items()
        }
        return Outcome(figures, marks, {"pairs": len(pairs)})


def drawn_pairs(world: GridWorld, split: Literal["validation", "test"], per_kind: int, draw: int) -> list[Pair]:
    """Pairs of scenes that differ in the colour and kind of one object, questions in turn."""
    rng = np.random.default_rng([draw, 23])
    stream = world.stream(split, draw)
    pairs: list[Pair] = []
    while len(pairs) < per_kind * QUESTIONS:
        scene = next(stream)
        made = _pair(world, scene, split, len(pairs) % QUESTIONS, rng)
        if made is not None:
            pairs.append(made)
    return pairs


def _pair(
    world: GridWorld, scene: GridScene, split: Literal["validation", "test"], asked: int, rng: np.random.Generator
) -> Pair | None:
    task, kinds = world.by_colour
    lonely = [thing for thing in scene.unique_colours().values() if thing.kind in kinds]
    lonely = [thing for thing in lonely if scene.unique_kinds().get(thing.kind) == thing]
    colours = set(COLOUR_WORDS) - {thing.colour for thing in scene.things} - {scene.background}
    free = set(kinds) - {thing.kind for thing in scene.things}
    if not (lonely and colours and free):
        return None
    thing = lonely[int(rng.integers(len(lonely)))]
    colour, kind = (sorted(words)[int(rng.integers(len(words)))] for words in (colours, free))
    donor = world.exchange(scene, thing, thing._replace(colour=colour, kind=kind), rng, split)
    row, column = row_words(scene.spec.rows)[thing.row], column_words(scene.spec.columns)[thing.column]
    question = (
        Question("colour", f"what colour is {kind} ?", colour, 1 / len(COLOUR_WORDS)),
        Question(task, f"what {task} is {colour} ?", kind, 1 / len(kinds)),
        Question("point", f"where is {kind} ?", f"{row} {column}", 0.01),
    )[asked]
    taken = {one.row * scene.spec.columns + one.column for one in scene.things}
    bare = [place for place in range(scene.spec.rows * scene.spec.columns) if place not in taken]
    cell = thing.row * scene.spec.columns + thing.column
    return Pair(scene, donor, cell, bare[int(rng.integers(len(bare)))], question)


def _answers(subject: Subject, world: GridWorld, pairs: Sequence[Pair]) -> list[list[str]]:
    """What is answered with the patch, without, with a bare patch, and on the second picture."""
    shown = asked_of(subject, world, [Example(pair.scene, pair.question) for pair in pairs])
    donor = asked_of(subject, world, [Example(pair.donor, pair.question) for pair in pairs])
    tokens = TokenMap.from_inputs(subject.model, shown)
    grids = [[span.grid for span in row] for row in tokens.images]
    if any(len(row) != 1 or row[0][0] * row[0][1] != 100 for row in grids):
        raise NotApplicable("patches of scenes are exchanged in a model with one visual token a patch, 100 a picture")
    seen = record(subject.model, donor, where=Group.IMAGE, levels=[0])
    states = torch.zeros(*tokens.group.shape, seen.states.shape[-1], dtype=seen.states.dtype, device=seen.states.device)
    row, place = seen.index.to(states.device).T
    states[row, place] = seen.at(0)

    def at(cells: Sequence[int]) -> Tensor:
        where = torch.zeros(tokens.group.shape, dtype=torch.bool, device=tokens.group.device)
        for row, cell in enumerate(cells):
            where[row, int(tokens.images[row][0].patches().flatten()[cell])] = True
        return where

    def said(inputs: dict[str, Any], *ablations: Any) -> list[str]:
        with torch.inference_mode(), apply(subject.model, *ablations, execute="dense"):
            out = subject.model.generate(**inputs, do_sample=False, max_new_tokens=4)  # type: ignore[operator]
        new = out[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in subject.processor.batch_decode(new, skip_special_tokens=True)]

    return [
        said(shown, replace(at([pair.cell for pair in pairs]), by=states)),
        said(shown),
        said(shown, replace(at([pair.bare for pair in pairs]), by=states)),
        said(donor),
    ]
