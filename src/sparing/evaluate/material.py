"""`Material`: what a profile is made on, in two halves: one chooses plans, the other reports them."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sparing.anatomy import anatomy_of
from sparing.evaluate.loss import TextLoss
from sparing.evaluate.measurements import Measurements
from sparing.evaluate.removal import Module, PrefillFlops, Removal
from sparing.execute import Run, apply
from sparing.plan import Policy

Split = Literal["choose", "report"]


class TimedPrompt(NamedTuple):
    """What speed is measured on.

    Attributes:
        inputs: of a prefill, rows of one length without padding.
        fed: `[b steps]`, the tokens of the cached steps after it.
    """

    inputs: dict[str, Any]
    fed: Tensor


class Material(abc.ABC):
    """What a model is profiled on.

    Attributes:
        model: the Hugging Face model.
        kinds: kinds of tokens that may enter late: name -> its share of the tokens and what it means.
        flops: counts a removal's operations on both halves together; after `prepare`.
    """

    name: ClassVar[Literal["text", "pictures"]]
    modules: ClassVar[tuple[Module, ...]]
    """What may be left out layer by layer."""
    fixed: ClassVar[str]
    """What no removal touches, in words."""
    page: ClassVar[Callable[..., Any]]
    """Makes what `paint` found into a `Painting` or a `PicturePage`."""
    kinds: dict[str, dict[str, Any]]
    flops: PrefillFlops

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._family = anatomy_of(model)
        self.shape = self._family.shape()
        self.longest: int = getattr(self._family.text_config, "max_position_embeddings", None) or 1 << 20

    @property
    def device(self) -> torch.device:
        """Where the model's input is expected."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[operator]

    @property
    def ready(self) -> bool:
        """Whether both halves are known, or `prepare` has to find out something first."""
        return True

    def prepare(self, store: Measurements, tell: Callable[[float, str], None]) -> None:
        """Find out what is missing; nothing by default.

        Args:
            store: keeps what is measured.
            tell: of progress, a share and a line.
        """
        return

    @property
    @abc.abstractmethod
    def content(self) -> Any:
        """What tells this material from any other, as JSON knows it."""

    @abc.abstractmethod
    def policies(self, removal: Removal) -> list[Policy]:
        """The policies that carry a removal out."""

    def applied(self, removal: Removal) -> Run:
        """`sparing.apply` of a removal; the stock forward runs where nothing is left out."""
        return apply(self.model, *self.policies(removal))

    @abc.abstractmethod
    def loss(self, split: Split, removal: Removal) -> TextLoss:
        """The loss of a removal on one half. One entry a window or question."""

    @abc.abstractmethod
    def check(self) -> None:
        """Run a little of it through the stock model.

        Raises:
            ValueError: a logit is NaN or infinite.
        """

    @abc.abstractmethod
    def timed(self, batch: int, steps: int) -> TimedPrompt:
        """Inputs to time a prefill and `steps` cached steps on (fewer, where a prompt is short)."""

    @abc.abstractmethod
    def paint(self, removal: Removal) -> dict[str, Any]:
        """Part of the reporting half with what became of every token, for the report."""

    asks: ClassVar[bool] = False
    """Whether there are questions, which `answers` answers and `compare` judges."""

    def answers(self, removal: Removal) -> list[str]:
        """What a planned model writes to the questions of the reporting half."""
        return []

    def compare(self, dense: list[str], planned: list[str]) -> dict[str, Any]:
        """The answers of the stock model and of the planned one, side by side and counted."""
        return {}

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """How much of it was used and how it was split."""
