"""Llama: pre-norm decoder, rotary positions, grouped-query attention, gated MLP."""

from __future__ import annotations

from sparing.anatomy.base import Anatomy, HFModule


class LlamaAnatomy(Anatomy):
    """`LlamaForCausalLM`."""

    model_types = ("llama",)

    @property
    def decoder(self) -> HFModule:
        """`LlamaModel`."""
        return self.model.model
