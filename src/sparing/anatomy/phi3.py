"""Phi-3: one matrix for queries, keys and values, one for the MLP's gate and input; part of a head may be rotated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparing.anatomy.base import Anatomy, HFModule


class Phi3Anatomy(Anatomy):
    """`Phi3ForCausalLM`."""

    model_types = ("phi3",)

    @property
    def decoder(self) -> HFModule:
        """`Phi3Model`."""
        return self.model.model

    def attention_end(self, layer: int) -> HFModule:
        """A dropout, in training."""
        return self.layers[layer].resid_attn_dropout

    def finish_attention(self, layer: int, branch: Tensor) -> Tensor:
        """A dropout, in training."""
        return self.layers[layer].resid_attn_dropout(branch)

    def mlp_end(self, layer: int) -> HFModule:
        """A dropout, in training."""
        return self.layers[layer].resid_mlp_dropout

    def finish_mlp(self, layer: int, branch: Tensor) -> Tensor:
        """A dropout, in training."""
        return self.layers[layer].resid_mlp_dropout(branch)

    def query(self, layer: int, normed: Tensor) -> Tensor:
        """The first rows of the fused matrix."""
        return self._part(layer, normed, 0)

    def key(self, layer: int, normed: Tensor) -> Tensor:
        """The rows after the queries'."""
        return self._part(layer, normed, 1)

    def value(self, layer: int, normed: Tensor) -> Tensor:
        """The last rows."""
        return self._part(layer, normed, 2)

    def _part(self, layer: int, normed: Tensor, part: int) -> Tensor:
        """Queries (0), keys (1) or values (2)."""
        attention, config = self.attention(layer), self.text_config
        kv = config.num_key_value_heads * attention.head_dim
        first = config.num_attention_heads * attention.head_dim
        rows = (slice(0, first), slice(first, first + kv), slice(first + kv, first + 2 * kv))[part]
        fused = attention.qkv_proj
        if type(fused) is nn.Linear and not fused._forward_hooks and not hasattr(fused, "_hf_hook"):
            out = F.linear(normed, fused.weight[rows], None if fused.bias is None else fused.bias[rows])
        else:
            # Quantised, offloaded or wrapped by LoRA: only the module itself knows its product.
            out = fused(normed)[..., rows]
        return out.unflatten(-1, (-1, attention.head_dim))

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The first `partial_rotary_factor` of each head."""
        width = cos.shape[-1]
        if width == x.shape[-1]:
            return super().rotate(x, cos, sin)
        return torch.cat([super().rotate(x[..., :width], cos, sin), x[..., width:]], dim=-1)

    def window(self, layer: int) -> int | None:
        """The same for every layer."""
        return self.text_config.sliding_window

    def intermediate(self, layer: int) -> int:
        """The module does not keep it."""
        return self.mlp(layer).down_proj.in_features
