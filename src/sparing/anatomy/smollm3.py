"""SmolLM3: the Llama layout; some layers rotate nothing (NoPE), and those may have a window."""

from __future__ import annotations

from sparing.anatomy.base import Anatomy, HFModule


class SmolLM3Anatomy(Anatomy):
    """`SmolLM3ForCausalLM`."""

    model_types = ("smollm3",)
    layer_types = ("full_attention", "sliding_attention")

    @property
    def decoder(self) -> HFModule:
        """`SmolLM3Model`."""
        return self.model.model

    def rotary_kind(self, layer: int) -> str | None:
        """`None` in the NoPE layers."""
        return "all" if self.attention(layer).use_rope else None
