"""What a task's passes cost: seconds, operations by part, bytes of KV cache; and how many rows go through at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from sparing.evaluate.task import Figure
from sparing.execute import Run
from sparing.plan import Ledger
from sparing.plan.cost import PARTS

T = TypeVar("T")
R = TypeVar("R")
BatchSize = int | Literal["auto"]
# Rows that `auto` begins with: a GPU halves them until they fit; a CPU gains nothing from more.
AUTO_GPU, AUTO_CPU = 64, 8
PHASES = ("prefill", "decode")


class Meter:
    """Adds up what passes cost while a task runs.

    Args:
        run: the run that the model is in.
        model: the model.

    Attributes:
        seconds: phase -> seconds inside the model (tokenizing, judging and counting are not in them).
        flops: phase -> part -> operations, by the ledger.
        dense_flops: the same with nothing left out, padding counted the same.
        kv_bytes: keys and values that could still be read at the end of each batch, summed.
        dense_kv_bytes: the same with nothing left out.
        rows: rows that went through.
    """

    def __init__(self, run: Run, model: nn.Module) -> None:
        self.run = run
        self.device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.flops = {phase: dict.fromkeys(PARTS, 0) for phase in PHASES}
        self.dense_flops = {phase: dict.fromkeys(PARTS, 0) for phase in PHASES}
        self.kv_bytes = self.dense_kv_bytes = self.rows = 0

    def now(self) -> float:
        """Seconds on a clock, when the device has finished what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def book(self, rows: int, prefill: float, decode: float = 0.0, ledger: Ledger | None = None) -> None:
        """Book the prompt that the run has just finished, and the steps after it.

        Args:
            rows: of the batch.
            prefill: seconds.
            decode: seconds.
            ledger: the record of what ran; the run's latest by default.
        """
        ledger = self.run.ledger if ledger is None else ledger
        self.rows += rows
        self.seconds["prefill"] += prefill
        self.seconds["decode"] += decode
        cost, dense = ledger.cost(), ledger.dense_cost()
        for phase in PHASES:
            for part in PARTS:
                self.flops[phase][part] += getattr(cost, phase).flops[part]
                self.dense_flops[phase][part] += getattr(dense, phase).flops[part]
        self.kv_bytes += cost.kv_bytes
        self.dense_kv_bytes += dense.kv_bytes

    def figures(self) -> dict[str, Figure]:
        """Seconds, and operations and KV bytes as shares of the dense model's."""
        spent, dense = (sum(sum(f.values()) for f in flops.values()) for flops in (self.flops, self.dense_flops))
        found = {"seconds": Figure(sum(self.seconds.values()), n=self.rows, better="lower", unit="seconds")}
        if dense:
            found["flops_share"] = Figure(spent / dense, n=self.rows, better="lower", unit="share")
        if self.dense_kv_bytes:
            kept = self.kv_bytes / self.dense_kv_bytes
            found["kv_share"] = Figure(kept, n=self.rows, better="lower", unit="share")
        return found

    def details(self) -> dict[str, Any]:
        """Everything, as JSON knows it."""
        return {
            "seconds": dict(self.seconds),
            "flops": {phase: dict(parts) for phase, parts in self.flops.items()},
            "dense_flops": {phase: dict(parts) for phase, parts in self.dense_flops.items()},
            "kv_bytes": self.kv_bytes,
            "dense_kv_bytes": self.dense_kv_bytes,
            "rows": self.rows,
        }


class Batches:
    """Cuts rows into batches. `auto` halves them whenever the device runs out of memory, and stays there.

    Args:
        size: rows of a batch, or `auto`.
        device: where the model is.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, size: BatchSize, device: torch.device) -> None:
        check_batch(size)
        self.may_shrink = size == "auto"
        self.size: int = (AUTO_GPU if device.type == "cuda" else AUTO_CPU) if isinstance(size, str) else size

    def run(self, rows: Sequence[T], work: Callable[[Sequence[T]], R]) -> Iterator[tuple[Sequence[T], R]]:
        """Each batch and what `work` made of it, in order.

        Raises:
            RuntimeError: out of memory with a batch of one, or with a size that was asked for.
        """
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        done = 0
        while done < len(rows):
            part = rows[done : done + self.size]
            try:
                found = work(part)
            except Exception as error:
                if not self.may_shrink or len(part) == 1 or not should_reduce_batch_size(error):
                    raise
                self.size = len(part) // 2
                found = None
            if found is None:
                # Not in the handler: there the error's traceback still holds what did not fit.
                clear_device_cache(garbage_collection=True)
                continue
            done += len(part)
            yield part, found


def check_batch(size: BatchSize) -> None:
    """Refuse what is no batch size.

    Raises:
        ValueError: see above.
    """
    if size != "auto" and (isinstance(size, str) or size < 1):
        raise ValueError(f'batch={size!r}: expected a number of rows, at least 1, or "auto"')
