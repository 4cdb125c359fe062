"""Training on scenes under whatever policies a subject has: what a method costs once the model may get used to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from sparing.evaluate.task import Progress, Subject
from sparing.evaluate.tasks.scenes import check_speaks
from sparing.study.trainings.training import Training
from sparing.train import ChatBatches, Optimisation, Part, about_scene, fit, forget_projector, trained_parts
from sparing.worlds.grids import GridScene, GridWorld, Question
from sparing.worlds.opening import scene_files, scene_world

PARTS: Mapping[str, Part] = {"language": "language", "bridge": "projector"}


@dataclasses.dataclass(frozen=True)
class SceneTraining(Training):
    """Fine-tuning on scenes as LLaVA is tuned: a picture and several turns about it, loss on the answers alone.

    The encoder stays frozen. The model runs under the subject's policies (on the fast path where the method says so), so a method
    can be compared retrained, against `dense` with the same steps on the same scenes.

    Attributes:
        steps: optimiser steps.
        rows: pictures a step.
        turns: questions about a picture.
        lr: peak learning rate; it rises over the first tenth and falls along a cosine.
        parts: what is trained: `language` the language model, `bridge` the projector.
        weight_decay: of AdamW.
        data: a folder of real digits and photographs to make the scenes of; drawn ones by default.
    """

    steps: int = 300
    rows: int = 6
    turns: int = 8
    lr: float = 5e-4
    parts: tuple[Literal["language", "bridge"], ...] = ("language", "bridge")
    weight_decay: float = 0.0
    data: Path | None = None

    def check(self) -> None:
        """Look at the settings."""
        for name in ("steps", "rows", "turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if not self.parts:
            raise ValueError("parts=[]: name at least one of language, bridge")
        scene_world(self.data)

    def files(self) -> tuple[Path, ...]:
        """What the scenes are made of."""
        return scene_files(self.data)

    def train(self, subject: Subject, *, seed: int, folder: Path, on_step: Progress | None = None) -> Subject:
        """Train."""
        self.check()
        check_speaks(subject, scene_world(self.data))
        model: Any = subject.model
        # In fp32, whatever the weights are kept in.
        kept, caches = model.dtype, model.config.get_text_config().use_cache
        trained_parts(model, tuple(PARTS[part] for part in self.parts))
        model.float().train()
        how = Optimisation(
            steps=self.steps,
            batch=1,  # an item is a batch already
            lr=self.lr,
            warmup=max(1, self.steps // 10),
            weight_decay=self.weight_decay,
            beta2=0.95,
        )
        with subject.applied():
            fit(
                model,
                _Turns(self, subject, seed),
                how,
                folder,
                collate=itemgetter(0),
                seed=seed,
                order="sequential",
                save_every=max(1, min(100, self.steps // 2)),
                # Ctrl-C is the study's.
                interruptible=False,
                on_step=on_step,
            )
        model.config.get_text_config().use_cache = caches
        return dataclasses.replace(subject, model=model.to(kept).eval().requires_grad_(True))


@dataclasses.dataclass(frozen=True)
class TwoSceneStages(Training):
    """LLaVA's two stages on scenes, under the subject's policies from the first step: a fresh projector alone, then both.

    Encoder and language model begin with the checkpoint's weights; the projector's are drawn from the seed.

    Attributes:
        aligning_steps: optimiser steps of the first stage.
        steps: of the second.
        aligning_lr: peak learning rate of the first stage.
        lr: of the second.
        rows: pictures a step.
        turns: questions about a picture.
        data: as in `SceneTraining`.
    """

    aligning_steps: int = 600
    steps: int = 600
    aligning_lr: float = 2e-3
    lr: float = 5e-4
    rows: int = 6
    turns: int = 8
    data: Path | None = None

    def check(self) -> None:
        """Look at the settings."""
        for stage in self.stages().values():
            stage.check()

    def files(self) -> tuple[Path, ...]:
        """What the scenes are made of."""
        return scene_files(self.data)

    def stages(self) -> dict[str, SceneTraining]:
        """The trainings by name, in order."""
        tuning = SceneTraining(self.steps, self.rows, self.turns, self.lr, data=self.data)
        aligning = dataclasses.replace(tuning, steps=self.aligning_steps, lr=self.aligning_lr, parts=("bridge",))
        return {"aligning": aligning, "tuning": tuning}

    def train(self, subject: Subject, *, seed: int, folder: Path, on_step: Progress | None = None) -> Subject:
        """Train, one stage after the other."""
        forget_projector(subject.model, seed)
        for i, (name, stage) in enumerate(self.stages().items()):

            def forward(done: float, word: str, i: int = i, name: str = name) -> None:
                if on_step is not None:
                    on_step((i + done) / 2, f"{name}: {word}")

            # The second stage must not see the first one's scenes again.
            subject = stage.train(subject, seed=2 * seed + i, folder=folder / name, on_step=forward)
        return subject


class _Turns(Dataset):
    """Item i is the batch of step i; it follows from the seed and i alone, so that a resumed run sees the same."""

    def __init__(self, settings: SceneTraining, subject: Subject, seed: int) -> None:
        self.settings, self.subject, self.seed = settings, subject, seed

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, index, 11])
        world = scene_world(self.settings.data)
        drawn = [world.draw(rng, "train") for _ in range(self.settings.rows)]
        asked = [world.questions(scene, rng, self.settings.turns) for scene in drawn]
        return turns_of(self.subject, world, drawn, asked)


def turns_of(
    subject: Subject, world: GridWorld, drawn: Sequence[GridScene], asked: Sequence[Sequence[Question]]
) -> dict[str, Tensor]:
    """A batch of chats: each a picture and questions with their answers, `labels` on answers and their ends alone."""
    chats = [about_scene(world, *pair, f"scene {i}") for i, pair in enumerate(zip(drawn, asked, strict=True))]
    rows = ChatBatches(subject.model, subject.processor, chats)
    return rows.collate([rows[i] for i in range(len(rows))])
