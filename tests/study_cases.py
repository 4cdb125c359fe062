"""Studies that take seconds: a zoo model, a page of its own text, and tasks and methods that do what a test asks."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path

from sparing import zoo
from sparing.evaluate.task import Figure, NotApplicable, Outcome, Subject, Task
from sparing.study.methods.method import Method, Prepared
from sparing.study.trainings.training import Training

PAGE = Path(zoo.__file__).parent / "pages" / "arithmetic.txt"

SMALL = f"""
study: small
seeds: [0, 1]
models:
  llama: {{path: arithmetic-llama}}
methods:
  dense: {{use: dense}}
  skip:
    use: SkipModules
    over: {{attention: [[1], [2], [1, 2]]}}
  random:
    use: skip_random
    with: {{text: {PAGE}, matches: none, max_tokens: 512, window: 64, budget: 0.8}}
tasks:
  page:
    use: perplexity
    with: {{text: {PAGE}, window: 64, max_tokens: 512}}
  short:
    use: perplexity
    with: {{text: {PAGE}, window: 32, max_tokens: 256}}
"""


def written(folder: Path, text: str = SMALL, name: str = "study.yaml") -> Path:
    """A study's YAML in a folder."""
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


@dataclasses.dataclass(frozen=True)
class Counting(Task):
    """Counts how often it is asked in a file, and fails where it is told to."""

    log: str
    value: float = 1.0
    error: str | None = None
    not_for: str | None = None
    seeds: bool = False

    @property
    def seeded(self) -> bool:
        return self.seeds

    def measure(self, subject: Subject, *, seed: int, on_step=None) -> Outcome:
        with Path(self.log).open("a") as file:
            file.write(f"{seed}\n")
        if self.error == "interrupt":
            raise KeyboardInterrupt
        if self.error == "memory":
            raise MemoryError("out of memory")
        if self.error:
            raise RuntimeError(self.error)
        if self.not_for:
            raise NotApplicable(self.not_for)
        if on_step:
            on_step(0.5, "half")
        return Outcome({"value": Figure(self.value + seed)}, details={"seed": seed})


@dataclasses.dataclass(frozen=True)
class Halve(Method):
    """Halves the final norm's weights: a method that changes the model."""

    changes_model = True

    def prepare(self, subject: Subject, *, seed: int, on_step=None) -> Prepared:
        subject.model.model.norm.weight.data *= 0.5
        return Prepared(subject, {"norm": float(subject.model.model.norm.weight.detach().mean())})


@dataclasses.dataclass(frozen=True)
class Nudge(Training):
    """Adds to the final norm's weights and counts how often it was asked."""

    log: str
    by: float = 0.25

    def train(self, subject: Subject, *, seed: int, folder: Path, on_step=None) -> Subject:
        with Path(self.log).open("a") as file:
            file.write(f"{seed}\n")
        assert folder.is_dir()
        subject.model.model.norm.weight.data += self.by * (1 + seed)
        return subject


@dataclasses.dataclass(frozen=True)
class NormMean(Task):
    """The mean of the final norm's weights."""

    def measure(self, subject: Subject, *, seed: int, on_step=None) -> Outcome:
        return Outcome({"mean": Figure(float(subject.model.model.norm.weight.detach().float().mean()))})
