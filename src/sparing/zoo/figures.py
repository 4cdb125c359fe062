"""What is measured of a zoo model: shares with their intervals, and what every card says."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparing.evaluate import statistics
from sparing.zoo.train import LOG

TEST_SEED = 1


@dataclass(frozen=True)
class Score:
    """How often a model is right on one kind of problem.

    Attributes:
        right: problems whose final answer is exactly right.
        total: problems asked.
        chance: how often a guess is right on the same problems.
    """

    right: int
    total: int
    chance: float

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return self.right / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The Wilson 95% interval of the accuracy."""
        return wilson(self.right, self.total)


@dataclass(frozen=True)
class Figures:
    """What the card says about a trained model.

    Attributes:
        scores: per kind of problem, on the test split.
        harder: per kind and difficulty, right answers and problems, of the same problems.
        more: further figures, which only this kind of model has.
        seconds: time of the training run, pauses not counted.
        parameters: trained numbers, tied ones once.
        size: of the weights file, in bytes.
    """

    scores: dict[str, Score]
    harder: dict[str, dict[int, tuple[int, int]]]
    more: dict[str, float]
    seconds: float
    parameters: int
    size: int


def wilson(right: int, total: int, *, level: float = 0.95) -> tuple[float, float]:
    """Returns the Wilson score interval of a share."""
    found = statistics.share(right, total, level=level)
    return found.low, found.high


def by_difficulty(marks: Iterable[tuple[str, int, bool]]) -> dict[str, dict[int, tuple[int, int]]]:
    """Right answers and problems per task and difficulty, from each answer's task, difficulty and rightness."""
    found: dict[str, dict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for task, level, right in marks:
        found[task][level].append(right)
    return {
        task: {level: (sum(group[level]), len(group[level])) for level in sorted(group)}
        for task, group in found.items()
    }


def training_seconds(run: Path) -> float:
    """Returns how long the run in a folder trained, over all its resumptions."""
    return json.loads((run / LOG).read_text().splitlines()[-1])["seconds"]


def machine_words(environment: Mapping[str, Any]) -> str:
    """The machine of a run and its versions in words, from what `run.json` holds of them."""
    hardware, versions = environment["hardware"], environment["versions"]
    gpus, threads = hardware["gpus"], hardware["threads"]
    machine = gpus[0] if gpus else f"{threads} thread{'s' if threads > 1 else ''} of {hardware['cpu']} (CPU)"
    return f"{machine};\n  torch {versions['torch']}, transformers {versions['transformers']}"
