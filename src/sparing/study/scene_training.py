"""Training on scenes under whatever policies a subject has: what a method costs once the model may get used to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from sparing.evaluate.task import Progress, Subject
from sparing.evaluate.tasks.scenes import check_speaks
from sparing.study.training import Training
from sparing.worlds.grids import GridScene, GridWorld, Question
from sparing.worlds.opening import scene_files, scene_world

IGNORED = -100
PARTS = {"language": ("language_model", "lm_head"), "bridge": ("multi_modal_projector",)}


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
        wanted = tuple(name for part in self.parts for name in PARTS[part])
        for name, weight in model.named_parameters():
            weight.requires_grad_(any(part in name for part in wanted))
        # In fp32, whatever the weights are kept in.
        kept = model.dtype
        model.float().train()
        tell = on_step or (lambda done, word: None)
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=self.steps,
            per_device_train_batch_size=1,  # an item is a batch already
            learning_rate=self.lr,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, self.steps // 10),
            weight_decay=self.weight_decay,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            use_cpu=model.device.type == "cpu",
            seed=seed,
            train_sampling_strategy="sequential",
            save_steps=max(1, min(100, self.steps // 2)),
            save_total_limit=1,
            logging_steps=max(1, self.steps // 20),
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
            label_names=["labels"],
        )
        with subject.applied():
            trainer = Trainer(
                model=_Wrapped(model),
                args=arguments,
                train_dataset=_Turns(self, subject, seed),
                data_collator=itemgetter(0),
                callbacks=[_Tell(tell, self.steps)],
            )
            # Its own printing would run through the study's progress.
            trainer.pop_callback(_printer())
            whole = any(folder.glob("checkpoint-*/trainer_state.json"))
            trainer.train(resume_from_checkpoint=whole)
        model.config.get_text_config().use_cache = True
        return dataclasses.replace(subject, model=model.to(kept).eval().requires_grad_(True))


class _Wrapped(nn.Module):
    """The model inside a plain module.

    Its checkpoints are plain state dicts. Those of a vision model itself have the hub's names, which the Trainer of transformers
    5.23 does not find again: it warns, and goes on with the weights that it was given.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        return {"loss": self.model(**inputs, use_cache=False).loss}


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
    tokenizer = subject.tokenizer
    words, end = tokenizer.get_vocab(), tokenizer.eos_token_id
    texts, labels = [], []
    for questions in asked:
        ids: list[int] = []
        for question in questions:
            answer = [words[word] for word in question.answer.split()] + [end]
            ids += [IGNORED] * len(question.text.split()) + answer
        texts.append(
            f"{tokenizer.bos_token}{subject.processor.image_token} "
            + " ".join(f"{q.text} {q.answer} {tokenizer.eos_token}" for q in questions)
        )
        labels.append(ids)
    inputs = subject.processor(
        images=[world.picture(scene) for scene in drawn],
        text=texts,
        return_tensors="pt",
        padding=True,
        padding_side="right",
        add_special_tokens=False,
    )
    found = torch.full_like(inputs["input_ids"], IGNORED)
    for row, ids in enumerate(labels):
        stop = int(inputs["attention_mask"][row].sum())
        found[row, stop - len(ids) : stop] = torch.tensor(ids)
    return {**inputs, "labels": found}


class _Tell(TrainerCallback):
    """Passes progress on."""

    def __init__(self, tell: Progress, steps: int) -> None:
        self.tell, self.steps, self.loss = tell, steps, float("nan")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        self.loss = (logs or {}).get("loss", self.loss)
        self.tell(state.global_step / self.steps, f"step {state.global_step} of {self.steps}, loss {self.loss:.3f}")


def _printer() -> type[TrainerCallback]:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback
