"""Trains a zoo model from its recipe, on a CPU or a GPU, resumable at any step."""

import json
import shutil
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainingArguments

from sparing.train.checkpoints import JsonLog, last_checkpoint, step_of, stop_on_signal
from sparing.zoo.course import Course
from sparing.zoo.precision import mixed
from sparing.zoo.recipe import Recipe
from sparing.zoo.scene_course import SceneCourse
from sparing.zoo.scene_recipe import SceneRecipe
from sparing.zoo.text_course import TextCourse
from sparing.zoo.text_recipe import TextRecipe

LOG = "log.jsonl"
FINAL = "final"


def course_of(recipe: Recipe, seed: int, data: Path | None = None) -> Course:
    """Makes a recipe ready to run, with fresh weights that depend on the seed alone.

    Raises:
        FileNotFoundError: real pictures are not in `data`.
        ValueError: nothing here trains such a recipe, or it needs `data` and there is none.
    """
    if isinstance(recipe, TextRecipe):
        return TextCourse(recipe, seed)
    if isinstance(recipe, SceneRecipe):
        return SceneCourse(recipe, seed, data)
    raise ValueError(f"expected a TextRecipe or a SceneRecipe, got a {type(recipe).__name__}: add a Course for it")


def train(
    recipe: Recipe,
    out: Path,
    *,
    seed: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    workers: int = 0,
    data: Path | None = None,
    fresh: bool = False,
    checkpoint_every: int = 250,
    bar: bool = True,
) -> Path:
    """Trains the recipe, or goes on from the last whole checkpoint in `out`.

    Ctrl-C and SIGTERM end the run after the current step with a checkpoint. A run that was interrupted and
    resumed gives the same weights as one that was not; on a CPU bit for bit (same machine and threads).

    Args:
        recipe: what to train.
        out: folder of checkpoints, the log `log.jsonl` and the result `final/`.
        seed: of weights and data; the recipe's by default.
        device: `cpu` or `cuda`.
        threads: CPU threads; PyTorch's choice by default.
        workers: processes that make batches ahead of the training; a GPU waits for its data otherwise. The batches are the same.
        data: folder of real pictures, for a recipe whose world is made of them.
        fresh: start again although `out` holds checkpoints.
        checkpoint_every: steps between checkpoints.
        bar: show a progress bar.

    Returns:
        The folder of the trained model: weights in bf16, config and tokenizer.

    Raises:
        KeyboardInterrupt: the run was ended before its last step.
        FileNotFoundError: real pictures are not in `data`.
        ValueError: `out` holds a run of another recipe or seed, or the recipe needs `data` and there is none.
    """
    seed = recipe.seed if seed is None else seed
    if threads:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    if fresh:
        for old in out.glob("checkpoint-*"):
            shutil.rmtree(old)
    checkpoint = last_checkpoint(out)
    _claim(out, recipe, seed, resuming=checkpoint is not None)
    course = course_of(recipe, seed, data)
    course.mixed = mixed(device)
    if device != "cpu":
        torch.set_float32_matmul_precision("high")
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=recipe.total_steps,
        per_device_train_batch_size=1,  # an item is a batch already
        learning_rate=recipe.peak_lr,
        weight_decay=recipe.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=mixed(device),
        use_cpu=device == "cpu",
        seed=seed,
        # Rows are random already; in order, the position in the data is the step and nothing else.
        train_sampling_strategy="sequential",
        save_steps=checkpoint_every,
        save_total_limit=2,
        logging_steps=min(20, max(1, recipe.total_steps // 8)),
        report_to=[],
        remove_unused_columns=False,
        dataloader_num_workers=workers,
        disable_tqdm=not bar,
    )
    log = JsonLog(out / LOG, kept=step_of(checkpoint) if checkpoint else 0)
    trainer = _CourseTrainer(
        course,
        args=arguments,
        data_collator=itemgetter(0),
        callbacks=[_Watch(course), log],
    )
    with stop_on_signal(trainer):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < recipe.total_steps:
        raise KeyboardInterrupt(
            f"stopped at step {trainer.state.global_step} of {recipe.total_steps}; run again to go on"
        )
    course.save(out / FINAL)
    return out / FINAL


class _CourseTrainer(Trainer):
    """A Trainer that leaves the loss to a course and the learning rate to its recipe."""

    def __init__(self, course: Course, **kwargs: Any):
        super().__init__(model=course.trained, train_dataset=course.batches, **kwargs)
        self.course = course

    def compute_loss(self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None):
        loss = self.course.loss(model, inputs)
        return (loss, {}) if return_outputs else loss

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.lr_scheduler = LambdaLR(cast(Optimizer, optimizer or self.optimizer), self.course.recipe.lr_factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler


class _Watch(TrainerCallback):
    """Puts what a course sees on validation data into the log."""

    def __init__(self, course: Course):
        self.course = course

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs and (figures := self.course.watch(state.global_step)):
            logs["validation"] = figures


def _claim(out: Path, recipe: Recipe, seed: int, *, resuming: bool) -> None:
    """Writes down what runs in the folder, or checks that it is the same run."""
    mine = json.loads(json.dumps({**vars(recipe), "seed": seed}, default=_as_mapping))
    path = out / "recipe.json"
    if resuming and json.loads(path.read_text()) != mine:
        raise ValueError(f"{out} holds another run (see {path}); choose another folder, or start again with --fresh")
    path.write_text(json.dumps(mine, indent=2) + "\n")


def _as_mapping(part: Any) -> dict:
    return dict(part) if isinstance(part, Mapping) else vars(part)
