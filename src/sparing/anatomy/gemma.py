"""Gemma 2 and Gemma 3 (text): norms after each branch too, windows in some layers, capped scores (2), two rotary bases (3)."""

from __future__ import annotations

from torch import Tensor

from sparing.anatomy.base import Anatomy, HFModule


class GemmaAnatomy(Anatomy):
    """`Gemma2ForCausalLM` and `Gemma3ForCausalLM`. Their embedding module scales; their forward caps the logits."""

    model_types = ("gemma2", "gemma3_text")
    layer_types = ("full_attention", "sliding_attention")

    @property
    def decoder(self) -> HFModule:
        """`Gemma2Model` or `Gemma3TextModel`."""
        return self.model.model

    def attention_end(self, layer: int) -> HFModule:
        """The norm after attention."""
        return self.layers[layer].post_attention_layernorm

    def finish_attention(self, layer: int, branch: Tensor) -> Tensor:
        """The norm after attention."""
        return self.layers[layer].post_attention_layernorm(branch)

    def mlp_norm(self, layer: int) -> HFModule:
        """`post_attention_layernorm` ends the branch before."""
        return self.layers[layer].pre_feedforward_layernorm

    def mlp_end(self, layer: int) -> HFModule:
        """The norm after the MLP."""
        return self.layers[layer].post_feedforward_layernorm

    def finish_mlp(self, layer: int, branch: Tensor) -> Tensor:
        """The norm after the MLP."""
        return self.layers[layer].post_feedforward_layernorm(branch)

    def query(self, layer: int, normed: Tensor) -> Tensor:
        """Normed per head in Gemma 3."""
        query = super().query(layer, normed)
        return self.attention(layer).q_norm(query) if self._third else query

    def key(self, layer: int, normed: Tensor) -> Tensor:
        """Normed per head in Gemma 3."""
        key = super().key(layer, normed)
        return self.attention(layer).k_norm(key) if self._third else key

    def rotary_kind(self, layer: int) -> str | None:
        """Gemma 3 rotates by another base in layers with a window."""
        return self.text_config.layer_types[layer] if self._third else "all"

    def rotary(self, hidden: Tensor, position_ids: Tensor, kind: str = "all") -> tuple[Tensor, Tensor]:
        """By the layers' own base."""
        if not self._third:
            return super().rotary(hidden, position_ids, kind)
        return self.decoder.rotary_emb(hidden, position_ids, kind)

    @property
    def final_cap(self) -> float | None:
        """Of the logits."""
        return self.text_config.final_logit_softcapping

    def softcap(self, layer: int) -> float | None:
        """Gemma 3's config has one too, but its attention does not use it."""
        return None if self._third else self.text_config.attn_logit_softcapping

    @property
    def _third(self) -> bool:
        return self.text_config.model_type == "gemma3_text"
