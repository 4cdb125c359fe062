"""`fit`: one run of an optimiser over batches, on `transformers.Trainer`: resumable, on one process or many."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from sparing.train.checkpoints import JsonLog, check_readable, last_checkpoint, step_of, stop_on_signal

Progress = Callable[[float, str], None]
LOG = "log.jsonl"


@dataclasses.dataclass(frozen=True)
class Optimisation:
    """How weights are moved.

    Attributes:
        steps: optimiser steps; if `None`, those of `epochs`.
        epochs: times that the data is gone through.
        batch: items of a step, over all processes.
        at_once: items of a forward pass; if `None`, a process's whole share of the step.
        lr: peak learning rate; it rises over `warmup` and falls along a cosine to zero.
        warmup: steps; below 1 a share of them.
        weight_decay: of AdamW.
        beta2: of AdamW.
        clip: most that the gradient's norm may be.
    """

    steps: int | None = None
    epochs: float = 1.0
    batch: int = 8
    at_once: int | None = None
    lr: float = 2e-5
    warmup: float = 0.03
    weight_decay: float = 0.0
    beta2: float = 0.999
    clip: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: one of them is out of range.
        """
        for name in ("batch", "steps", "at_once"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
        for name in ("lr", "epochs"):
            if not (math.isfinite(value := getattr(self, name)) and value > 0):
                raise ValueError(f"{name}={value:g}: expected a finite number above 0")
        if not (math.isfinite(self.warmup) and self.warmup >= 0):
            raise ValueError(f"warmup={self.warmup:g}: expected steps, or a share of them below 1")

    def shared(self, processes: int) -> tuple[int, int]:
        """Items of a forward pass of one process, and how many of these make a step.

        Raises:
            ValueError: the step cannot be shared evenly.
        """
        if self.batch % processes:
            raise ValueError(f"a batch of {self.batch} cannot be shared by {processes} processes: give a multiple")
        share = self.batch // processes
        at_once = min(share, self.at_once or share)
        if share % at_once:
            raise ValueError(f"{share} items a process are no multiple of the {at_once} at once: give a divisor")
        return at_once, share // at_once


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a run came to.

    Attributes:
        steps: optimiser steps, those of earlier, interrupted runs included.
        loss: mean of the last logged steps, nats a token.
        seconds: of this run.
        tokens: that this run went through, visual ones included, padding not, over all processes.
    """

    steps: int
    loss: float
    seconds: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Of this run, over all processes; NaN where it had nothing left to do."""
        return self.tokens / self.seconds if self.tokens else float("nan")


def fit(
    model: nn.Module,
    data: Dataset,
    how: Optimisation,
    folder: Path,
    *,
    collate: Callable[[list[Any]], dict[str, Tensor]],
    seed: int = 0,
    autocast: bool = False,
    order: Literal["random", "sequential"] = "random",
    save_every: int = 500,
    workers: int = 0,
    interruptible: bool = True,
    on_step: Progress | None = None,
) -> Fit:
    """Train the parameters of a model that ask for gradients, or go on from the last whole checkpoint in `folder`.

    The model runs as it is: inside `sparing.apply(model, ...)` it follows its policies, under the fast executor too where decisions
    are fixed.
    Checkpoints hold the trained parameters alone. A run that was interrupted and resumed sees the same batches as one that was not.
    Started by `accelerate launch` or `torchrun`, every process takes its share of each batch.

    Args:
        model: its forward returns an object with a `loss`, for batches that hold `labels`.
        data: items by number.
        how: the optimiser's settings.
        folder: for checkpoints and the log (`log.jsonl`).
        collate: items -> batch.
        seed: of the data's order and everything else that is random.
        autocast: compute in bfloat16 on weights that are kept as they are.
        order: of the items; `sequential` where the data is random already.
        save_every: steps between checkpoints.
        workers: processes that prepare batches.
        interruptible: end with a checkpoint on Ctrl-C and SIGTERM.
        on_step: is told the share that is done, and a word on it.

    Raises:
        KeyboardInterrupt: the run was ended; a checkpoint holds all steps so far.
        ValueError: nothing is trained, no data, a loss that is not finite, a batch that processes cannot share, or a checkpoint
            that cannot be read.
        OSError: a checkpoint could not be written.
    """
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    if not trained:
        raise ValueError("no parameter asks for gradients: say which parts are trained")
    if not len(data):  # type: ignore[arg-type]
        raise ValueError("there is no data to train on")
    folder.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    arguments = _arguments(how, folder, device, seed=seed, autocast=autocast, order=order, workers=workers)
    # All GPUs in one process would mean threads, and a plan is one thread's: accelerate starts one process each.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    at_once, accumulated = how.shared(arguments.world_size)
    arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps = at_once, accumulated
    steps = how.steps or max(1, round(how.epochs * math.ceil(len(data) / how.batch)))  # type: ignore[arg-type]
    arguments.max_steps, arguments.save_steps = steps, max(1, min(save_every, steps))
    arguments.warmup_steps = math.ceil(how.warmup * steps) if how.warmup < 1 else int(how.warmup)
    arguments.logging_steps = max(1, min(10, steps // 10))
    wrapped = _TrainedAlone(model)
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        check_readable(checkpoint)
        if step_of(checkpoint) >= steps:
            wrapped.load_state_dict(load_file(checkpoint / SAFE_WEIGHTS_NAME))
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            return Fit(state.global_step, _last_loss(state), 0.0, 0)
    watch = _Watch(on_step or (lambda done, word: None), steps)
    callbacks: list[TrainerCallback] = [watch]
    if arguments.process_index == 0:
        callbacks.append(JsonLog(folder / LOG, kept=step_of(checkpoint) if checkpoint else 0))
    trainer = _Checked(model=wrapped, args=arguments, train_dataset=data, data_collator=collate, callbacks=callbacks)
    # Its own printing would run through the caller's progress.
    trainer.pop_callback(PrinterCallback)
    with stop_on_signal(trainer) if interruptible else contextlib.nullcontext(lambda: False) as told:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        # In the last step too: more may follow, another stage say.
        stopped = told()
    state = trainer.state
    if stopped or state.global_step < steps:
        raise KeyboardInterrupt(f"stopped at step {state.global_step} of {steps}; run again to go on")
    tokens = int(state.num_input_tokens_seen) - watch.before
    return Fit(state.global_step, _last_loss(state), watch.seconds, tokens)


def _last_loss(state: TrainerState) -> float:
    """The last that was logged, by an earlier run where this one had few steps left."""
    return next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), float("nan"))


def _arguments(
    how: Optimisation,
    folder: Path,
    device: torch.device,
    *,
    seed: int,
    autocast: bool,
    order: Literal["random", "sequential"],
    workers: int,
) -> TrainingArguments:
    cpu = device.type == "cpu"
    return TrainingArguments(
        output_dir=str(folder),
        learning_rate=how.lr,
        lr_scheduler_type="cosine",
        weight_decay=how.weight_decay,
        adam_beta2=how.beta2,
        max_grad_norm=how.clip,
        bf16=autocast,
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and torch.distributed.is_torchelastic_launched() else None,
        # A batch without pictures leaves the projector out.
        ddp_find_unused_parameters=True,
        seed=seed,
        train_sampling_strategy=order,
        save_total_limit=1,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        label_names=["labels"],
        # The loss is looked at in every step.
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        dataloader_num_workers=workers,
        dataloader_pin_memory=not cpu,
    )


class _TrainedAlone(nn.Module):
    """The model inside a plain module, whose state is what is trained.

    Checkpoints of a vision model itself have the hub's names, which the Trainer of transformers 5.23 does not find again: it warns,
    and goes on with the weights that it was given. And frozen weights need no copy.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        """The loss of a batch; rows whose answers were all cut off count nothing."""
        if (items := inputs.get("num_items_in_batch")) is not None:
            inputs["num_items_in_batch"] = torch.as_tensor(items).clamp(min=1)
        loss = self.model(**inputs, use_cache=False).loss
        if self.training and not loss.requires_grad:
            # Rows without pictures, where only what makes pictures is trained: nothing to learn, and no error either.
            loss = loss + sum(0 * weight.sum() for weight in self.parameters() if weight.requires_grad)
        return {"loss": loss}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """What asks for gradients."""
        return {name: weight.detach().contiguous() for name, weight in self.named_parameters() if weight.requires_grad}

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        """Back into the same parameters, no more and no fewer.

        Raises:
            ValueError: they are others.
        """
        own = {name for name, weight in self.named_parameters() if weight.requires_grad}
        if own != set(state):
            strange = min(own ^ set(state)).removeprefix("model.")
            raise ValueError(
                f"the training checkpoint trains other parameters than this run ({strange}): choose another --out"
            )
        super().load_state_dict(state, strict=False, assign=assign)
        return _IncompatibleKeys([], [])


class _Checked(Trainer):
    """A Trainer that ends where the loss is no number, before the optimiser spreads it, and words what else goes wrong."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().get_batch_samples(*args, **kwargs)
        except ValueError as error:
            # Of a process that prepares batches torch brings the whole traceback as the message; its own stands last.
            line, after = re.split("^ValueError: ", str(error), flags=re.MULTILINE)[-1], ""
            # Several processes save together, and the others know nothing of this row.
            if self.state.global_step and self.args.world_size == 1:
                self._save_checkpoint(self.model, None)
                after = f" (step {self.state.global_step} is kept: mend it, and the same command goes on)"
            raise ValueError(line.rstrip() + after) from error

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if not math.isfinite(value := float(loss)):
            raise ValueError(self._explain(value))
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:
            # Of a full disk torch says no more than that a file has not the length that it should have.
            folder = Path(str(self.args.output_dir))
            free, line = shutil.disk_usage(folder).free / 1e6, " ".join(str(error).split())
            unfinished = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            if self.args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
            kept = last_checkpoint(folder)
            after = f"goes on from {kept.name}" if kept else "begins again"
            raise OSError(
                f"the checkpoint {unfinished} could not be written, {free:.0f} MB are free there ({line}): make room, then the same "
                f"command {after}"
            ) from error

    def _explain(self, value: float) -> str:
        broken = [name for name, weight in self.model.named_parameters() if not bool(torch.isfinite(weight).all())]  # type: ignore[union-attr]
        step = self.state.global_step + 1
        if broken and step == 1:
            name = broken[0].removeprefix("model.")
            return f"the weights contain NaN or infinite values: {name}; the checkpoint is damaged, save it again"
        kept = last_checkpoint(Path(str(self.args.output_dir)))
        go_on = f"; {kept} is whole" if kept is not None else ""
        return f"the loss is {value} at step {step}: lower --lr (now {self.args.learning_rate:g}), or use --dtype float32{go_on}"


class _Watch(TrainerCallback):
    """Passes progress on, and takes the time."""

    def __init__(self, tell: Progress, steps: int) -> None:
        self.tell, self.steps, self.loss = tell, steps, float("nan")
        self.began = self.ended = 0.0
        self.before = 0

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began, self.before = time.monotonic(), int(state.num_input_tokens_seen)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended = time.monotonic()
        rate = (int(state.num_input_tokens_seen) - self.before) / max(self.seconds, 1e-9)
        loss = f", loss {self.loss:.3f}" if math.isfinite(self.loss) else ""
        said = f"step {state.global_step} of {self.steps}{loss}, {rate:.0f} tokens/s"
        self.tell(state.global_step / self.steps, said)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        self.loss = (logs or {}).get("loss", self.loss)
