"""Llama: pre-norm decoder, rotary positions, grouped-query attention, gated MLP."""

from __future__ import annotations

from torch import nn

from sparing.anatomy.base import Anatomy


class LlamaAnatomy(Anatomy):
    """`LlamaForCausalLM`."""

    model_types = ("llama",)

    @property
    def decoder(self) -> nn.Module:
        """`LlamaModel`."""
        return self.model.model
