"""Mistral: the Llama layout; one window for every layer, where the config has one."""

from __future__ import annotations

from sparing.anatomy.base import Anatomy, HFModule


class MistralAnatomy(Anatomy):
    """`MistralForCausalLM`."""

    model_types = ("mistral",)

    @property
    def decoder(self) -> HFModule:
        """`MistralModel`."""
        return self.model.model

    def window(self, layer: int) -> int | None:
        """The same for every layer."""
        return self.text_config.sliding_window
