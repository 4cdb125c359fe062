"""What every measurement has in common: a `Subject` goes into a `Task`, an `Outcome` comes out."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from sparing.execute import Run, apply
from sparing.plan import Policy

Progress = Callable[[float, str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A model as a task sees it: with the policies that act on it.

    Attributes:
        model: a Hugging Face model of a known family, in eval mode.
        processor: its tokenizer (text) or processor (vision); `None` if the checkpoint has none.
        policies: what decides; the stock model without any.
        execute: the executor, as `sparing.apply` takes it.
    """

    model: nn.Module
    processor: Any
    policies: tuple[Policy, ...] = ()
    execute: str = "gathered"

    def applied(self) -> Run:
        """`sparing.apply` of the policies, a context manager."""
        return apply(self.model, *self.policies, execute=self.execute)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, a processor's own too.

        Raises:
            ValueError: the checkpoint has none.
        """
        if self.processor is None:
            raise ValueError("the checkpoint has no tokenizer: save it there with tokenizer.save_pretrained(directory)")
        return getattr(self.processor, "tokenizer", self.processor)


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number that a task found.

    Attributes:
        value: the number.
        low: lower end of its 95% interval; `None` where no interval can be told.
        high: upper end.
        n: how many items it is made of.
        better: which way is better; `None` for a figure that only describes.
        unit: `share`, `nats`, `seconds`, `tokens`, `bytes`, ...; empty for a plain number.
    """

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    better: Literal["higher", "lower"] | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        """Refuse half an interval, and one that does not hold its value.

        Raises:
            ValueError: the interval is no interval.
        """
        if (self.low is None) != (self.high is None):
            raise ValueError(f"expected both ends of an interval or none, got {self.low} and {self.high}")
        if self.low is not None and self.high is not None and math.isfinite(self.value):
            slack = 1e-9 * max(1.0, abs(self.value))
            if not self.low - slack <= self.value <= self.high + slack:
                raise ValueError(f"expected an interval around {self.value:g}, got {self.low:g} to {self.high:g}")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a task found out about a subject.

    Attributes:
        figures: name -> number; the first one is what the task is about.
        items: figure -> item's name -> its score, for paired comparisons between subjects; only of figures that are means.
        details: whatever else a reader of the drill-down should see, as JSON knows it.
    """

    figures: Mapping[str, Figure]
    items: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse an outcome without figures, and scores of a figure that is not there.

        Raises:
            ValueError: see above.
        """
        if not self.figures:
            raise ValueError("expected at least one figure, got none")
        if strays := sorted(set(self.items) - set(self.figures)):
            raise ValueError(f"expected scores of figures ({', '.join(self.figures)}), got scores of {strays[0]}")

    @property
    def main(self) -> str:
        """The name of the figure that the task is about."""
        return next(iter(self.figures))


class NotApplicable(ValueError):
    """A method cannot act on this model, or a task cannot be asked of it: recorded, not fatal to a study."""


class Ingredient(abc.ABC):
    """What a study is put together from: a method, a training, a task.

    Whatever is final below it is a frozen dataclass whose fields are the settings; a study's YAML gives them.
    """

    def check(self) -> None:
        """Look at the settings and the data, before anything slow begins.

        Raises:
            ValueError: a file is missing or empty, a setting is out of range.
        """
        return

    def files(self) -> tuple[Path, ...]:
        """Local files whose content the result depends on."""
        return ()

    @property
    def seeded(self) -> bool:
        """Does the result depend on the seed? If not, one seed is enough."""
        return False


class Task(Ingredient):
    """Something to measure."""

    @abc.abstractmethod
    def measure(self, subject: Subject, *, seed: int, on_step: Progress | None = None) -> Outcome:
        """Measure.

        Args:
            subject: the model with its policies.
            seed: of whatever is random in the task.
            on_step: is told the share that is done, and a word on it.

        Raises:
            NotApplicable: the task cannot be asked of this model.
            ValueError: bad data.
        """

    def work(self, subject: Subject) -> float | None:
        """About how many tokens the model will have to go through; `None` where that cannot be told beforehand."""
        return None

    @property
    def timed(self) -> bool:
        """Are seconds the result, so that nothing else may run beside it?"""
        return False
