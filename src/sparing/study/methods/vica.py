"""ViCA in studies, its reading layers chosen by a criterion or placed without looking: what must choosing beat?"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, Literal

from sparing.anatomy import anatomy_of, fingerprint
from sparing.evaluate import PictureMaterial, read_questions
from sparing.evaluate.measurements import Measurements
from sparing.evaluate.pictures.drawn import draw_scenes
from sparing.evaluate.pictures.questions import QUESTIONS
from sparing.evaluate.reading_layers import Budget, added_features, check_sees, choose_layers
from sparing.evaluate.task import NotApplicable, Progress, Subject
from sparing.evaluate.tasks.scenes import check_speaks
from sparing.execute import apply
from sparing.study.methods.method import Method, Prepared
from sparing.worlds.opening import scene_files, scene_world

SCENES_SEED = 3


@dataclasses.dataclass(frozen=True)
class SelectedViCA(Method):
    """`ViCA` whose reading layers are chosen in the model itself: see `sparing.evaluate.reading_layers.choose_layers`.

    Attributes:
        by: `greedy`, `kl`, `cosine`; or `random` (drawn by the cell's seed), `first`, `last`, `uniform`, which look at nothing.
        budget: layers (0 is blind, the floor of a sweep), or a share of the visual FLOPs (`5%`).
        prefix: as in `ViCA`.
        images: a folder of pictures with a questions.jsonl to choose on; scenes of the validation split by default.
        data: a folder of real digits and photographs to make those scenes of; drawn ones by default.
        per_task: scenes of each task.
        max_questions: most questions of the folder. Half of them choose.
        execute: the executor.
    """

    by: Literal["greedy", "kl", "cosine", "random", "first", "last", "uniform"] = "greedy"
    budget: int | str = "5%"
    prefix: Literal["update", "freeze"] | int = "update"
    images: Path | None = None
    data: Path | None = None
    per_task: int = 6
    max_questions: int = 128
    execute: Literal["gathered", "dense"] = "gathered"

    @property
    def seeded(self) -> bool:
        """Layers drawn at random are."""
        return self.by == "random"

    def check(self) -> None:
        """The budget must be one, the folder must hold questions."""
        Budget.of(self.budget)
        if self.per_task < 2:
            raise ValueError(f"per_task={self.per_task}: expected at least 2, half of the scenes choose")
        if self.images is not None:
            read_questions(self.images, self.max_questions)
        scene_world(self.data)

    def files(self) -> tuple[Path, ...]:
        """The questions and their pictures."""
        if self.images is None:
            return scene_files(self.data)
        asked = read_questions(self.images, self.max_questions)
        return (self.images / QUESTIONS, *dict.fromkeys(file for each in asked for file in each.pictures))

    def prepare(self, subject: Subject, *, seed: int, on_step: Progress | None = None) -> Prepared:
        """Choose, and try it on."""
        if subject.policies:
            raise NotApplicable("layers are chosen on a stock model, and this checkpoint comes with policies")
        try:
            check_sees(subject.model)
            material = self._material(subject)
            key = fingerprint(subject.model), *map(str, (self.images, self.data, self.per_task, self.max_questions))
            # A larger budget goes on where a smaller one ended.
            store = _STORES.setdefault(key, Measurements(None, ""))
            if not material.ready:
                material.prepare(store, on_step or (lambda done, line: None))
            budget = Budget.of(self.budget)
            choice = choose_layers(
                material, self.by, budget, prefix=self.prefix, seed=seed, store=store, on_step=on_step
            )
            policy = choice.policy()
            with apply(subject.model, policy, execute=self.execute):
                pass
        except NotApplicable:
            raise
        except ValueError as error:
            raise NotApplicable(f"ViCA's layers cannot be chosen in this model: {error}") from error
        details: dict[str, Any] = {"policy": repr(policy), **choice.as_dict()}
        if (note := added_features(anatomy_of(subject.model))) is not None:
            details["notes"] = [note]
        return Prepared(dataclasses.replace(subject, policies=(policy,), execute=self.execute), details)

    def _material(self, subject: Subject) -> PictureMaterial:
        if self.images is not None:
            asked = read_questions(self.images, self.max_questions)
            return PictureMaterial(subject.model, subject.processor, asked)
        world = scene_world(self.data)
        check_speaks(subject, world)
        with tempfile.TemporaryDirectory() as folder:
            draw_scenes(Path(folder), self.per_task, SCENES_SEED, "validation", world)
            return PictureMaterial(subject.model, subject.processor, read_questions(Path(folder)))


_STORES: dict[tuple[str, ...], Measurements] = {}
