"""Checkpoints of unfinished training as the Trainer leaves them, its log, and an orderly end on Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainerCallback


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(folder: Path) -> Path | None:
    """The latest whole checkpoint in a folder."""
    # The Trainer writes its state last; a folder without it was cut off while being written.
    whole = [state.parent for state in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=step_of, default=None)


def check_readable(checkpoint: Path) -> None:
    """Look whether a checkpoint's files end where they should; their contents are not read.

    Raises:
        ValueError: one of them was cut short.
    """
    for file in sorted(checkpoint.iterdir()):
        damage = None
        if file.suffix in (".pt", ".pth") and not zipfile.is_zipfile(file):
            damage = "it was cut short"
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt"):
                    pass
            except SafetensorError as error:
                damage = str(error)
        if damage is not None:
            raise ValueError(
                f"{file} is damaged ({damage}): remove {checkpoint}, then the training goes on from an earlier checkpoint, or begins "
                "again where there is none"
            )


class JsonLog(TrainerCallback):
    """Appends what the Trainer logs to a file, one JSON object a line.

    Args:
        path: the file.
        kept: the step that training goes on from: later entries of an earlier run are dropped.
    """

    def __init__(self, path: Path, kept: int) -> None:
        self.path = path
        entries = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            # A kill may have cut the last one short.
            with contextlib.suppress(json.JSONDecodeError):
                entries.append(json.loads(line))
        # Steps after the checkpoint are run again; kept, they would stand in the log twice.
        entries = [entry for entry in entries if entry["step"] <= kept]
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        self.began = time.monotonic() - (entries[-1]["seconds"] if entries else 0.0)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Append."""
        with self.path.open("a") as file:
            seconds = round(time.monotonic() - self.began, 1)
            file.write(json.dumps({"step": state.global_step, "seconds": seconds, **(logs or {})}) + "\n")


@contextlib.contextmanager
def stop_on_signal(trainer: Trainer) -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C or SIGTERM into a checkpoint and an orderly end after the current step.

    Of several processes it is enough that one is told: all of them end after the same step.

    Yields:
        Whether any process was told so far; to be called in all of them.
    """

    class Stop(TrainerCallback):
        asked = False

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if _any(self.asked, args.device):
                control.should_save = control.should_training_stop = True

    stop = Stop()
    trainer.add_callback(stop)

    def ask(number: int, frame: Any) -> None:
        stop.asked = True
        # The second one ends the process as usual.
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: _any(stop.asked, trainer.args.device)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _any(flag: bool, device: torch.device) -> bool:
    """Whether it is set in any process."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return flag
    found = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return bool(found)
