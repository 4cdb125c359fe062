"""What may happen to a subject between its method and its tasks: training that recovers what was lost."""

from __future__ import annotations

import abc
from pathlib import Path

from sparing.evaluate.task import Ingredient, Progress, Subject


class Training(Ingredient):
    """One way to train a subject.

    A study saves what training returns (`sparing.save`) under its cell's key, so that no later task trains again.
    """

    @abc.abstractmethod
    def train(self, subject: Subject, *, seed: int, folder: Path, on_step: Progress | None = None) -> Subject:
        """Train.

        Args:
            subject: a model that nobody else holds, with its policies.
            seed: of the data's order and everything else that is random.
            folder: for checkpoints of an unfinished training, so that it goes on where it was killed.
            on_step: is told the share that is done, and a word on it.

        Raises:
            NotApplicable: this model cannot be trained so.
            ValueError: bad data.
        """

    @property
    def seeded(self) -> bool:
        """Does the result depend on the seed?"""
        return True
