"""Recipes: everything that decides what a zoo model becomes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One model of the zoo and how it is trained.

    Attributes:
        name: folder name of the weights.
        summary: one sentence for lists and the card.
        model_type: Hugging Face model type, such as `llama`.
        config: fields of the Hugging Face config, without those of the tokenizer.
        length: tokens in a row, in most steps.
        batch: rows in such a step.
        long_length: tokens in a row in the other steps, which have as many tokens in fewer rows.
        long_every: every so many steps is a long one. Short rows are cheaper, long ones teach the positions.
        steps: optimiser steps.
        lr: peak learning rate; cosine to zero after the warm-up.
        warmup: steps until the peak.
        weight_decay: of AdamW, on matrices.
        prompt_weight: weight of a question's tokens in the loss, where an answer's weigh 1. Questions are
            mostly random, so that their loss is mostly noise.
        longest_document: a document has 1 to this many problems.
        seed: of the initial weights and of the data.
    """

    name: str
    summary: str
    model_type: str
    config: Mapping[str, Any]
    length: int = 128
    batch: int = 16
    long_length: int = 512
    long_every: int = 8
    steps: int
    lr: float
    warmup: int
    weight_decay: float = 0.1
    prompt_weight: float = 0.1
    longest_document: int = 24
    seed: int = 0

    def shrunk(self) -> "Recipe":
        """The same model with two layers, and a run of seconds: what tests train."""
        config = MappingProxyType({**self.config, "num_hidden_layers": 2})
        return replace(self, config=config, length=64, batch=4, long_length=128, steps=8, warmup=2)


ARITHMETIC_LLAMA = Recipe(
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

RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in (ARITHMETIC_LLAMA,)})
