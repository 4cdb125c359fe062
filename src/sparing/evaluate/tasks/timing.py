"""Seconds and bytes as a task: prefill, decode and memory against the stock model of the same run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from sparing.anatomy import anatomy_of
from sparing.evaluate import statistics
from sparing.evaluate.speed import Timing, time_arms
from sparing.evaluate.task import Figure, NotApplicable, Outcome, Progress, Subject, Task
from sparing.execute import Run


@dataclasses.dataclass(frozen=True)
class SpeedTask(Task):
    """How much faster, and how much smaller, than the stock model: both arms in turns, after warm-up, medians.

    Beside every speed-up stands its floor: what the share of operations alone predicts.

    Attributes:
        prompt: tokens of a prompt.
        steps: cached single-token steps after it.
        batches: batch sizes; the figures of the first one count.
        repeats: measured repeats of each arm.
    """

    prompt: int = 512
    steps: int = 32
    batches: tuple[int, ...] = (1, 8)
    repeats: int = 5

    def check(self) -> None:
        """Sizes must be positive.

        Raises:
            ValueError: one is not.
        """
        for name in ("prompt", "steps", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batches={list(self.batches)}: name at least one batch size, each at least 1")

    @property
    def timed(self) -> bool:
        """Seconds are the result."""
        return True

    def work(self, subject: Subject) -> float:
        """Both arms' tokens; a decoding step counts as 32 of a prefill's, whatever the batch."""
        return 2 * (self.repeats + 2) * sum(b * self.prompt + 32 * self.steps for b in self.batches)

    def measure(self, subject: Subject, *, seed: int, on_step: Progress | None = None) -> Outcome:
        """Time random tokens: what they are does not change what is computed, except for routers."""
        longest = anatomy_of(subject.model).text_config.max_position_embeddings
        if self.prompt + self.steps > longest:
            raise NotApplicable(
                f"prompt={self.prompt} and steps={self.steps} are more than the model's {longest} positions: lower them"
            )
        vocabulary = anatomy_of(subject.model).shape().vocabulary
        generator = torch.Generator().manual_seed(seed)
        figures: dict[str, Figure] = {}
        details: dict[str, Any] = {}
        for i, batch in enumerate(self.batches):
            ids = torch.randint(vocabulary, (batch, self.prompt + self.steps), generator=generator)

            def planned() -> Run:
                return subject.applied()

            timing = time_arms(subject.model, planned, ids, steps=self.steps, repeats=self.repeats)
            figures |= _figures(timing)
            details[f"batch {batch}"] = dataclasses.asdict(timing)
            if on_step:
                on_step((i + 1) / len(self.batches), f"batch {batch}")
        return Outcome(figures, details=details)


def _figures(timing: Timing) -> dict[str, Figure]:
    at = f" (batch {timing.batch})"
    dense, planned = timing.samples["dense"], timing.samples["planned"]
    rate = timing.batch * timing.steps
    prefill, decode = ([pair[which] for pair in planned] for which in (0, 1))
    return {
        f"prefill speed-up{at}": _faster([pair[0] for pair in dense], prefill),
        f"prefill speed-up by operations{at}": Figure(1 / max(timing.prefill_flops, 1e-9)),
        f"decode speed-up{at}": _faster([pair[1] for pair in dense], decode),
        f"decode speed-up by operations{at}": Figure(1 / max(timing.decode_flops, 1e-9)),
        f"prefill seconds{at}": _median(prefill, "seconds", "lower"),
        f"decode tokens a second{at}": _median([rate / s for s in decode], "tokens/s", "higher"),
        f"peak memory of prefill{at}": Figure(
            timing.peak_bytes["planned"] / max(timing.peak_bytes["dense"], 1), better="lower", unit="share of dense"
        ),
        f"KV cache{at}": Figure(
            timing.kv_bytes["planned"] / max(timing.kv_bytes["dense"], 1), better="lower", unit="share of dense"
        ),
    }


def _faster(dense: Sequence[float], planned: Sequence[float]) -> Figure:
    """Median over the repeats of dense over planned seconds: neighbours in time share what else the machine did."""
    return _median([a / b for a, b in zip(dense, planned, strict=True)], "", "higher")


def _median(values: Sequence[float], unit: str, better: Any) -> Figure:
    found = statistics.median(values)
    known = len(values) > 1
    return Figure(found.value, found.low if known else None, found.high if known else None, found.n, better, unit)
