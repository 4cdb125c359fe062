"""What a profile is made from (`Settings`), and what it finds out (`Profile`)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from sparing.evaluate.painting import Painting
from sparing.evaluate.pictures.painting import PicturePage
from sparing.evaluate.search import Method
from sparing.evaluate.speed import Timing

PHASES = ("answers", "sensitivity", "reading", "search", "control", "speed")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a profile is made.

    Attributes:
        budget: share of the dense prefill's operations that the plan may cost.
        method: `greedy` runs the most promising candidates of every step; `additive` trusts single removals.
        width: candidates of a greedy step.
        max_tokens: tokens of the text that are used; half of them to choose, half to report.
        window: most tokens of a window.
        max_questions: questions about pictures that are used; half of them to choose, half to report.
        entries: most entry layers that are tried for a kind of tokens, and most numbers of reading layers.
        controls: random plans of the same budget.
        seed: of the random plans.
        repeats: timed repeats; 0 skips timing.
        batches: batch sizes that are timed.
        steps: cached decoding steps that are timed.
    """

    budget: float = 0.6
    method: Method = "greedy"
    width: int = 4
    max_tokens: int = 8192
    window: int = 256
    max_questions: int = 128
    entries: int = 16
    controls: int = 3
    seed: int = 0
    repeats: int = 5
    batches: tuple[int, ...] = (1, 8)
    steps: int = 32

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: one of them is out of range.
        """
        if not (math.isfinite(self.budget) and 0 < self.budget <= 1):
            raise ValueError(
                f"budget {self.budget:g} is not a share of the operations: give a number above 0 and up to 1"
            )
        if self.method not in ("greedy", "additive"):
            raise ValueError(f'search {self.method!r} is not known: choose "greedy" or "additive"')
        for name, least in (("width", 1), ("max_tokens", 1), ("window", 8), ("entries", 1), ("max_questions", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least {least}")

    def quick(self) -> Settings:
        """The same with less text, fewer questions, no re-measured candidates and shorter timing: seconds instead of a minute."""
        return dataclasses.replace(
            self,
            method="additive",
            max_tokens=min(self.max_tokens, 2048),
            max_questions=min(self.max_questions, 32),
            entries=min(self.entries, 4),
            repeats=2,
            steps=8,
        )


@dataclasses.dataclass(frozen=True)
class Point:
    """One plan and what it does.

    Attributes:
        plan: what is left out.
        name: the plan's name.
        flops_ratio: operations of a prefill of all windows, as a share of the dense model's; from the ledger.
        kv_ratio: the same for bytes of keys and values.
        loss: nats a token on the windows that plans are chosen on.
        held_out: nats a token on the other windows.
        added: loss added on the held-out windows, with a 95% interval over windows (paired).
    """

    plan: dict[str, Any]
    name: str
    flops_ratio: float
    kv_ratio: float
    loss: float
    held_out: float
    added: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Profile:
    """Everything `sparing profile` found out. `as_dict` is what `run.json` holds and the report reads.

    Attributes:
        model: name, sizes and dtype.
        text: how much of the text was used, and how it was split; empty for pictures.
        pictures: the same of questions about pictures; empty for a text.
        settings: how the profile was made.
        kinds: the kinds of tokens that occur, with their share of the tokens.
        modules: added loss of leaving one module out alone: module -> layer -> nats a token. `image_` modules are left out for
            image tokens only; `image_read` means that nobody reads them in this layer.
        entries: added loss of one kind entering late, alone: kind -> layer -> nats a token.
        reading: plans that compute image tokens in no layer and read them in fewer and fewer; none for a text.
        dense: the stock model.
        planned: the chosen plan.
        plan_call: the chosen plan as a call.
        path: every accepted step, dense model first.
        controls: random plans of the same budget.
        flops: operations of a prefill of all windows: arm -> part -> count.
        kv_bytes: arm -> bytes.
        lowest_ratio: operations left without any module (the output matrix), as a share.
        timings: measured speed, one a batch size.
        answers: what stock and planned model write to the questions that report, and how many are right; empty for a text.
        painting: a page of the material with what became of every token, see `Painting` and `PicturePage`.
        seconds: seconds of this run, resumed measurements not counted.
        measured: measurements of this run; the others were found in the file.
    """

    model: dict[str, Any]
    text: dict[str, Any]
    pictures: dict[str, Any]
    settings: Settings
    kinds: dict[str, dict[str, Any]]
    modules: dict[str, dict[int, float]]
    entries: dict[str, dict[int, float]]
    reading: list[Point]
    dense: Point
    planned: Point
    plan_call: str
    path: list[Point]
    controls: list[Point]
    flops: dict[str, dict[str, int]]
    kv_bytes: dict[str, int]
    lowest_ratio: float
    timings: list[Timing]
    answers: dict[str, Any]
    painting: Painting | PicturePage
    seconds: float
    measured: int

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        return dataclasses.asdict(self)
