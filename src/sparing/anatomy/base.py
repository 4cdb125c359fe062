"""`Anatomy`: where the parts of a decoder layer are, for one model family."""

from __future__ import annotations

import abc
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from sparing.anatomy.attention import Masks, masks_of
from sparing.anatomy.fingerprint import fingerprint_of
from sparing.plan import LayerShape, ModelShape
from sparing.tokens import Group, ImageSpan, TokenMap

# torch types every attribute of a module as `Tensor | Module`; an adapter knows which modules it speaks of.
HFModule = Any


class Anatomy(abc.ABC):
    """Where the parts of a model are. One small subclass a family; everything else in the library works through it.

    The attributes that a plain pre-norm decoder shares (Llama and its many relatives) have defaults here.

    Args:
        model: the Hugging Face model.
    """

    model_types: tuple[str, ...] = ()
    """`config.model_type` values that this adapter serves."""
    layer_types: tuple[str, ...] = ("full_attention",)
    """Kinds of layers (`config.layer_types`) that this adapter knows."""
    output: type = BaseModelOutputWithPast
    """What the decoder returns."""

    def __init__(self, model: nn.Module) -> None:
        self.model: HFModule = model
        self.config: Any = model.config
        self.text_config: Any = self.config.get_text_config()
        self.layers: list[HFModule] = list(self.decoder.layers)[: self.text_config.num_hidden_layers]
        self.check()

    def check(self) -> None:
        """Refuse a decoder that has what this adapter does not know.

        Raises:
            ValueError: an unknown kind of layer, attention that is not causal, or an attention implementation that does not
                compute what the model is.
        """
        name = self.text_config.model_type
        unknown = set(getattr(self.text_config, "layer_types", None) or ()) - set(self.layer_types)
        if unknown:
            raise ValueError(
                f"{name} with {sorted(unknown)[0]!r} layers is unknown; known kinds of layers: {', '.join(self.layer_types)}"
            )
        both_ways = getattr(self.text_config, "use_bidirectional_attention", None)
        if not getattr(self.text_config, "is_causal", True) or both_ways is True or both_ways == "all":
            raise ValueError(f"this {name} attends in both directions; plans are about causal decoders")
        if self.attention_backend == "sdpa" and any(self.softcap(i) is not None for i in range(len(self.layers))):
            raise ValueError(
                f"{name} caps its attention scores, which sdpa leaves out: load it with attn_implementation='eager'"
            )

    # Where modules are -------------------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def decoder(self) -> HFModule:
        """The module that embeds, runs the layers and applies the final norm."""

    @property
    def lm_head(self) -> HFModule:
        """The output matrix."""
        return self.model.get_output_embeddings()

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding matrix."""
        return self.model.get_input_embeddings().num_embeddings

    def embed(self, ids: Tensor) -> Tensor:
        """Words as they enter the first layer: `[n]` -> `[n d]`, with the factor that the family gives them (Gemma)."""
        return self.model.get_input_embeddings()(ids)

    @property
    def final_cap(self) -> float | None:
        """`c` where logits become `c tanh(logit / c)`."""
        return None

    @property
    def sliceable_head(self) -> bool:
        """Whether logits of some words can be had without those of all others: the output matrix is a plain, unwrapped one."""
        head = self.lm_head
        return type(head) is nn.Linear and not head._forward_hooks and not hasattr(head, "_hf_hook")

    def logits(self, normed: Tensor, words: slice | Tensor) -> Tensor:
        """Logits of some words, the family's cap included: `[n d]`, behind the final norm, -> `[n w]`, in float32."""
        head, cap = self.lm_head, self.final_cap
        if self.sliceable_head:
            bias = None if head.bias is None else head.bias[words].float()
            out = F.linear(normed.float(), head.weight[words].float(), bias)
        else:
            # Quantised, offloaded or wrapped by LoRA: only the module itself knows its product.
            out = head(normed.to(next(self.decoder.norm.parameters()).dtype))[..., words].float()
        return out if cap is None else cap * torch.tanh(out / cap)

    def attention(self, layer: int) -> HFModule:
        """The attention module of a layer."""
        return self.layers[layer].self_attn

    def attention_norm(self, layer: int) -> HFModule:
        """The norm before attention."""
        return self.layers[layer].input_layernorm

    def attention_end(self, layer: int) -> HFModule:
        """The module whose output is added to the residual as the attention branch (a post-norm, where there is one)."""
        return self.layers[layer].self_attn

    def mlp(self, layer: int) -> HFModule:
        """The MLP of a layer."""
        return self.layers[layer].mlp

    def mlp_norm(self, layer: int) -> HFModule:
        """The norm before the MLP; its input is the residual after attention."""
        return self.layers[layer].post_attention_layernorm

    def mlp_end(self, layer: int) -> HFModule:
        """The module whose output is added to the residual as the MLP branch."""
        return self.layers[layer].mlp

    @functools.cached_property
    def shares_norms(self) -> bool:
        """Whether the norms before attention differ in their weights alone (see `unit_norm`), and nothing hangs on them."""
        norms = [self.attention_norm(layer) for layer in range(len(self.layers))]
        plain = all(
            type(norm) is type(norms[0])
            and type(norm).__name__.endswith("RMSNorm")
            and getattr(norm, "variance_epsilon", None) == getattr(norms[0], "variance_epsilon", 0)
            and not (norm._forward_hooks or norm._forward_pre_hooks or hasattr(norm, "_hf_hook"))
            for norm in norms
        )
        return plain and type(norms[0]).__module__.startswith("transformers.")

    def unit_norm(self, x: Tensor) -> Tensor:
        """`x` divided by its root mean square, as every norm before attention does before its weight (where `shares_norms`)."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.attention_norm(0).variance_epsilon)
        return (wide * scale).to(x.dtype)

    # The parts of attention --------------------------------------------------------------------------------------

    def query(self, layer: int, normed: Tensor) -> Tensor:
        """`[... d]` -> `[... heads head_dim]`, before rotary embedding."""
        attention = self.attention(layer)
        return attention.q_proj(normed).unflatten(-1, (-1, attention.head_dim))

    def key(self, layer: int, normed: Tensor) -> Tensor:
        """`[... d]` -> `[... kv_heads head_dim]`, before rotary embedding."""
        attention = self.attention(layer)
        return attention.k_proj(normed).unflatten(-1, (-1, attention.head_dim))

    def value(self, layer: int, normed: Tensor) -> Tensor:
        """`[... d]` -> `[... kv_heads head_dim]`."""
        attention = self.attention(layer)
        return attention.v_proj(normed).unflatten(-1, (-1, attention.head_dim))

    def project(self, layer: int, mixed: Tensor) -> Tensor:
        """The output projection: `[... heads*head_dim]` -> `[... d]`."""
        return self.output_projection(layer)(mixed)

    def output_projection(self, layer: int) -> HFModule:
        """The module of the output projection."""
        return self.attention(layer).o_proj

    def rotary_kind(self, layer: int) -> str | None:
        """Layers of one kind share their angles; `None` where a layer rotates nothing."""
        return "all"

    def rotary(self, hidden: Tensor, position_ids: Tensor, kind: str = "all") -> tuple[Tensor, Tensor]:
        """Cosines and sines `[b t head_dim]` for these positions, in layers of one `rotary_kind`."""
        return self.decoder.rotary_emb(hidden, position_ids=position_ids)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply rotary embedding. x: `[b t heads head_dim]`; cos, sin: `[b t head_dim]` (or broadcast over b)."""
        half = x.shape[-1] // 2
        rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * cos.unsqueeze(-2) + rotated * sin.unsqueeze(-2)

    def finish_attention(self, layer: int, branch: Tensor) -> Tensor:
        """From the output projection to the branch end (post-norms). Row-wise; nothing by default."""
        return branch

    def run_mlp(self, layer: int, normed: Tensor) -> Tensor:
        """The MLP on packed rows, `[n d]` or `[b m d]`."""
        return self.mlp(layer)(normed)

    def finish_mlp(self, layer: int, branch: Tensor) -> Tensor:
        """From the MLP's output to the branch end."""
        return branch

    def scaling(self, layer: int) -> float:
        """What scores are multiplied by before the softmax."""
        return self.attention(layer).scaling

    def softcap(self, layer: int) -> float | None:
        """`c` where scores become `c tanh(score / c)` before the mask and the softmax."""
        return None

    def window(self, layer: int) -> int | None:
        """A query of this layer sees keys less than this many tokens back; `None` if it sees all."""
        kinds = getattr(self.text_config, "layer_types", None)
        return self.text_config.sliding_window if kinds and kinds[layer] == "sliding_attention" else None

    @property
    def attention_backend(self) -> str:
        """The model's attention implementation (`sdpa`, `eager`, ...)."""
        return self.text_config._attn_implementation or "eager"

    def masks(self, *, exact: bool) -> Masks:
        """The form in which the model's attention function takes masks (see `masks_of`)."""
        capped = any(self.softcap(i) is not None for i in range(len(self.layers)))
        return masks_of(self.attention(0), self.attention_backend, exact=exact, capped=capped)

    def eager_attention(self, layer: int) -> Any:
        """The family's own eager attention function."""
        return sys.modules[type(self.attention(layer)).__module__].eager_attention_forward

    def fingerprint(self) -> str:
        """Says which checkpoint this is, wherever it lies and under whatever name (see `sparing.anatomy.fingerprint`)."""
        return fingerprint_of(self.model)

    # Sizes and tokens --------------------------------------------------------------------------------------------

    def shape(self) -> ModelShape:
        """The sizes that costs are counted from."""
        layers = tuple(self.layer_shape(i) for i in range(len(self.layers)))
        dtype = next(self.decoder.parameters()).dtype
        return ModelShape(layers, self.text_config.vocab_size, dtype.itemsize, self.encoder_flops())

    def layer_shape(self, layer: int) -> LayerShape:
        """The sizes of one layer."""
        return LayerShape(
            hidden=self.text_config.hidden_size,
            heads=self.text_config.num_attention_heads,
            kv_heads=self.text_config.num_key_value_heads,
            head_dim=self.attention(layer).head_dim,
            intermediate=self.intermediate(layer),
            window=self.window(layer),
        )

    def intermediate(self, layer: int) -> int:
        """Width of the MLP."""
        return self.mlp(layer).intermediate_size

    def encoder_flops(self) -> int:
        """Operations of the vision encoder and projector in one run (one picture, or one tile of it); 0 without one."""
        return 0

    def picture_flops(self, span: ImageSpan) -> int:
        """Operations of the vision encoder and projector on one picture."""
        return span.tiles * self.encoder_flops()

    @property
    def vision_encoder(self) -> HFModule | None:
        """The vision encoder, or `None`."""
        return None

    def feature_norms(self, features: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        """How large the encoder's feature behind each image token is, `[n]` over the image tokens of a batch in order.

        A token that covers several patches has the largest one's; NaN where no patch is behind a token (newlines).

        Args:
            features: what the vision encoder returned for these inputs.
            inputs: what the model was called with.

        Returns:
            `None` where the family cannot tell.
        """
        return None

    @property
    def encoder_attentions(self) -> Sequence[HFModule]:
        """The attention modules of the vision encoder's layers, in order; empty where the family cannot tell."""
        return ()

    @property
    def projector(self) -> tuple[HFModule, ...]:
        """The modules that turn what the vision encoder sees into tokens; empty without one."""
        return ()

    @property
    def pictures_from(self) -> HFModule | None:
        """The module whose `get_image_features` encodes pictures, or `None`."""
        return None

    picture_sizes: tuple[str, ...] = ()
    """Arguments of `get_image_features` that say how large each picture is."""

    adds: tuple[str, ...] = ()
    """Arguments of the decoder that hold what is added to the residual stream between layers."""

    @property
    def added_after(self) -> tuple[int, ...]:
        """The layers after which the model adds to the residual stream of image tokens."""
        return ()

    def additions(self, kwargs: Mapping[str, Any]) -> dict[int, tuple[Tensor, Tensor]]:
        """What is added after a layer: `[b t]`, to which tokens, and `[n d]`, a row for each of them in order."""
        return {}

    def positions(self, position_ids: Tensor) -> Tensor:
        """Position ids as a `TokenMap` holds them: `[b t]`, or `[axes b t]` without a row for the text."""
        return position_ids

    @property
    def remembers_positions(self) -> HFModule | None:
        """The module whose `rope_deltas` say, after a prompt with pictures, where later turns stand; `None` if none does."""
        return None

    def is_image_token(self, input_ids: Tensor) -> Tensor | None:
        """Which ids are image placeholders `[b t]`; `None` for a text model."""
        return None

    def image_spans(self, inputs: Mapping[str, Any], is_image: Tensor) -> tuple[tuple[ImageSpan, ...], ...]:
        """One tuple of spans a row. Only called when there are image tokens."""
        return ((),) * is_image.shape[0]

    def read_tokens(self, inputs: Mapping[str, Any]) -> TokenMap:
        """Build the `TokenMap` of a prompt (see `TokenMap.from_inputs`)."""
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        if ids is None and embeds is None:
            raise ValueError(
                "inputs have neither input_ids nor inputs_embeds: pass what the tokenizer or processor returned"
            )
        first: Any = ids if ids is not None else embeds
        (b, t), device = first.shape[:2], first.device
        group = torch.full((b, t), int(Group.TEXT), dtype=torch.int8, device=device)
        images: tuple[tuple[ImageSpan, ...], ...] = ((),) * b
        is_image = self.is_image_token(ids) if ids is not None else None
        if is_image is not None and bool(is_image.any()):
            images = self.image_spans(inputs, is_image)
            before = is_image.long().cumsum(1) == 0
            has_picture = is_image.any(1, keepdim=True)
            group = torch.where(before & has_picture, int(Group.SYSTEM), group)
            group = torch.where(is_image, int(Group.IMAGE), group)
        mask = inputs.get("attention_mask")
        if mask is not None:
            if mask.ndim != 2:
                raise ValueError(
                    f"attention_mask has {mask.ndim} dimensions: pass the 2-D padding mask, and express the rest with LayerPlan.sees"
                )
            group = torch.where(mask[:, -t:].to(device) == 0, int(Group.PAD), group)
        position_ids = inputs.get("position_ids")
        if position_ids is None:
            position_ids = torch.arange(t, device=device).expand(b, t)
        elif position_ids.shape[-2] == 1 and b > 1:
            position_ids = position_ids.expand(*position_ids.shape[:-2], b, t)
        return TokenMap(group=group, position_ids=position_ids, images=images, ids=ids)
