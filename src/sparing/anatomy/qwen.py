"""Qwen2, Qwen3 and Qwen3-MoE: biases (2) or norms (3) on queries and keys, windows in some layers, experts (MoE)."""

from __future__ import annotations

import dataclasses

from torch import Tensor
from transformers.modeling_outputs import MoeModelOutputWithPast

from sparing.anatomy.base import Anatomy, HFModule
from sparing.plan import LayerShape


class Qwen2Anatomy(Anatomy):
    """`Qwen2ForCausalLM`."""

    model_types = ("qwen2",)
    layer_types = ("full_attention", "sliding_attention")

    @property
    def decoder(self) -> HFModule:
        """`Qwen2Model`."""
        return self.model.model


class Qwen3Anatomy(Anatomy):
    """`Qwen3ForCausalLM` and `Qwen3MoeForCausalLM`."""

    model_types = ("qwen3", "qwen3_moe")
    layer_types = ("full_attention", "sliding_attention")

    @property
    def decoder(self) -> HFModule:
        """`Qwen3Model` or `Qwen3MoeModel`."""
        return self.model.model

    @property
    def output(self) -> type:  # type: ignore[override]
        """With room for router logits, where there are experts."""
        return MoeModelOutputWithPast if self._mixed else super().output

    @property
    def _mixed(self) -> bool:
        return self.text_config.model_type == "qwen3_moe"

    def query(self, layer: int, normed: Tensor) -> Tensor:
        """Normed per head."""
        return self.attention(layer).q_norm(super().query(layer, normed))

    def key(self, layer: int, normed: Tensor) -> Tensor:
        """Normed per head."""
        return self.attention(layer).k_norm(super().key(layer, normed))

    def window(self, layer: int) -> int | None:
        """With experts, the same for every layer."""
        return self.text_config.sliding_window if self._mixed else super().window(layer)

    def run_mlp(self, layer: int, normed: Tensor) -> Tensor:
        """The block of experts takes `[b m d]` only."""
        return self.mlp(layer)(normed.reshape(1, -1, normed.shape[-1])).view_as(normed)

    def layer_shape(self, layer: int) -> LayerShape:
        """With experts, where this layer has them."""
        shape, config = super().layer_shape(layer), self.text_config
        if not hasattr(self.mlp(layer), "experts"):
            return shape
        return dataclasses.replace(shape, experts=config.num_experts, active_experts=config.num_experts_per_tok)

    def intermediate(self, layer: int) -> int:
        """Of one expert, where this layer has them."""
        mlp = self.mlp(layer)
        return self.text_config.moe_intermediate_size if hasattr(mlp, "experts") else mlp.intermediate_size
