"""Recipes: everything that decides what a zoo model becomes."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Recipe(abc.ABC):
    """One model of the zoo and how it is trained; each kind of model has its own fields beside these.

    Attributes:
        name: folder name of the weights.
        summary: one sentence for lists and the card.
        model_type: Hugging Face model type, such as `llama`.
        config: fields of the Hugging Face config, without those of the tokenizer.
        weight_decay: of AdamW, on matrices.
        seed: of the initial weights and of the data.
    """

    name: str
    summary: str
    model_type: str
    config: Mapping[str, Any]
    weight_decay: float = 0.1
    seed: int = 0

    @property
    @abc.abstractmethod
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""

    @property
    @abc.abstractmethod
    def peak_lr(self) -> float:
        """The highest learning rate of the run."""

    @abc.abstractmethod
    def lr_factor(self, step: int) -> float:
        """The share of the peak learning rate that a step, counted from 0, runs at."""

    @abc.abstractmethod
    def shrunk(self) -> "Recipe":
        """The same model, smaller, and a run of seconds: what tests train."""
