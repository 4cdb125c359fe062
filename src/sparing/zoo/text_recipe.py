"""The recipe of `arithmetic-llama`: a small Llama, trained on rows of problems in plain text."""

import math
from dataclasses import dataclass, replace
from types import MappingProxyType

from sparing.zoo.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class TextRecipe(Recipe):
    """A text model that is trained on `sparing.worlds.arithmetic`.

    Attributes:
        length: tokens in a row, in most steps.
        batch: rows in such a step.
        long_length: tokens in a row in the other steps, which have as many tokens in fewer rows.
        long_every: every so many steps is a long one. Short rows are cheaper, long ones teach the positions.
        steps: optimiser steps.
        lr: peak learning rate; cosine to zero after the warm-up.
        warmup: steps until the peak.
        prompt_weight: weight of a question's tokens in the loss, where an answer's weigh 1. Questions are
            mostly random, so that their loss is mostly noise.
        longest_document: a document has 1 to this many problems.
    """

    length: int = 128
    batch: int = 16
    long_length: int = 512
    long_every: int = 8
    steps: int
    lr: float
    warmup: int
    prompt_weight: float = 0.1
    longest_document: int = 24

    @property
    def total_steps(self) -> int:
        """As in `Recipe`."""
        return self.steps

    @property
    def peak_lr(self) -> float:
        """As in `Recipe`."""
        return self.lr

    def lr_factor(self, step: int) -> float:
        """As in `Recipe`: linear to the peak, then a half cosine to zero."""
        if step < self.warmup:
            return step / max(1, self.warmup)
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))

    def shrunk(self) -> "TextRecipe":
        """As in `Recipe`: two layers, eight short steps."""
        config = MappingProxyType({**self.config, "num_hidden_layers": 2})
        return replace(self, config=config, length=64, batch=4, long_length=128, steps=8, warmup=2)


ARITHMETIC_LLAMA = TextRecipe(
    name="arithmetic-llama",
    summary="An eight-layer Llama with grouped-query attention that solves small problems in plain text.",
    model_type="llama",
    config=MappingProxyType(
        {
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            # 1/sqrt(hidden_size) and not the usual 0.02, with which attention at this width starts all but flat.
            "initializer_range": 0.088,
        }
    ),
    steps=9600,
    lr=2e-3,
    warmup=100,
)
