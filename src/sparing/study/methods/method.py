"""What a study compares: a `Method` turns a loaded model into the `Subject` that tasks measure."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from sparing.evaluate.task import Ingredient, Progress, Subject


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a method made of a model.

    Attributes:
        subject: the model with its policies.
        details: what it chose, as JSON knows it, for the report.
    """

    subject: Subject
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Method(Ingredient):
    """One way to make a model cheaper."""

    changes_model: ClassVar[bool] = False
    """Are weights changed or taken away, so that the next method needs the model loaded afresh?"""

    @abc.abstractmethod
    def prepare(self, subject: Subject, *, seed: int, on_step: Progress | None = None) -> Prepared:
        """Act on a loaded model.

        Args:
            subject: the model, with the policies that its checkpoint came with.
            seed: of whatever is random in the method.
            on_step: is told the share that is done, and a word on it.

        Raises:
            NotApplicable: the method cannot act on this model.
            ValueError: bad data.
        """
