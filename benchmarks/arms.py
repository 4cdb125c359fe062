"""What the engine benchmarks share: models of a shape, hand-written oracles, interleaved timing, peak memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from sparing.plan import LayerPlan, Policy, View
from sparing.tokens import Group, TokenMap


def build(layers: int, hidden: int, heads: int, kv_heads: int, mlp: int, vocabulary: int, dtype, device="cpu"):
    """A Llama with random weights, in eval mode."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device=device).to(dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1) if "norm" in name else weight.normal_(0, 0.02, generator=generator)
    # Buffers were empty on the meta device: compute the rotary frequencies again.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.eval()


def picture_prompt(model, batch: int, visual: int = 576, text: int = 64) -> tuple[dict[str, Tensor], TokenMap]:
    """Embeddings of a system prompt, one picture and a question, and what each token is."""
    device, system = model.device, text // 3
    group = torch.full((batch, visual + text), int(Group.TEXT), device=device)
    group[:, :system] = int(Group.SYSTEM)
    group[:, system : system + visual] = int(Group.IMAGE)
    generator = torch.Generator(device).manual_seed(1)
    embeds = torch.randn(*group.shape, model.config.hidden_size, generator=generator, device=device).to(model.dtype)
    return {"inputs_embeds": embeds, "logits_to_keep": 1}, TokenMap.from_groups(group)


def around(decoder: LlamaForCausalLM, visual: int, pictures: int = 1, encoder: dict | None = None):
    """A LLaVA around a Llama (it shares the weights) that makes `visual` tokens of its pictures, with random weights.

    Args:
        decoder: from `build`.
        visual: tokens of all pictures together; each is a square.
        pictures: how many there are.
        encoder: sizes of the encoder (`CLIPVisionConfig`); a tiny one by default, for what is timed without it.
    """
    side = math.isqrt(visual // pictures)
    if side * side * pictures != visual:
        raise ValueError(f"{visual} visual tokens are not {pictures} square pictures")
    sizes = encoder or {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=14 * side, patch_size=14),
        text_config=decoder.config,
        image_token_id=decoder.config.vocab_size - 1,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.language_model, model.lm_head = decoder.model, decoder.lm_head
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        part.to_empty(device=decoder.device).to(decoder.dtype)
        generator = torch.Generator(decoder.device).manual_seed(4)
        with torch.no_grad():
            for weight in part.parameters():
                weight.normal_(0, 0.02, generator=generator)
        for module in part.modules():
            if hasattr(module, "position_ids"):
                module.position_ids = torch.arange(module.num_positions, device=decoder.device)[None]
    return model.eval()


def picture_ids(model, batch: int, visual: int, text: int = 64) -> tuple[Tensor, Tensor]:
    """Ids of a system prompt, pictures and a question, and of the same without pictures; questions differ from row to row."""
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(3, model.config.text_config.vocab_size - 1, (batch, text), generator=generator).to(
        model.device
    )
    picture = words.new_full((batch, visual), model.config.image_token_id)
    system = text // 3
    words[:, :system] = words[:1, :system].clone()
    return torch.cat([words[:, :system], picture, words[:, system:]], 1), words


def text_prompt(model, batch: int, length: int) -> dict[str, Tensor | int]:
    """Random ids."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, model.config.vocab_size, (batch, length), generator=generator).to(model.device)
    return {"input_ids": ids, "logits_to_keep": 1}


class SkipAtRandom(Policy):
    """Each token skips each module with a fixed probability, by masks that are drawn beforehand."""

    def __init__(self, depth: int, batch: int, length: int, share: float, device) -> None:
        generator = torch.Generator().manual_seed(3)
        self.masks = [
            [(torch.rand(batch, length, generator=generator) >= share).to(device) for _ in range(2)]
            for _ in range(depth)
        ]

    def plan_attend(self, view: View) -> LayerPlan:
        """Keys and values stay dense, as in SkipGPT."""
        attend, feed = self.masks[view.layer]
        return LayerPlan(attend=attend, feed=feed)


class ViCAOracle:
    """ViCA's prefill by hand, on a model's own weights: text rows in every layer, visual keys and values in the reading ones."""

    def __init__(self, model: LlamaForCausalLM, tokens: TokenMap, layers: list[int]) -> None:
        self.model, self.reading = model, set(layers)
        visual = (tokens.group[0] == Group.IMAGE).nonzero().flatten()
        self.start, self.stop = int(visual[0]), int(visual[-1]) + 1
        t = tokens.length
        index = torch.arange(t, device=model.device)
        self.text = torch.cat([index[: self.start], index[self.stop :]])
        self.mask = index[None] <= self.text[:, None]
        self.positions = index

    def __call__(self, inputs_embeds: Tensor, logits_to_keep: int) -> Tensor:
        """The last token's logits."""
        model = self.model
        config, decoder = model.config, model.model
        heads, kv, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        cos, sin = decoder.rotary_emb(inputs_embeds, self.positions[None])
        cos_t, sin_t = cos[:, self.text], sin[:, self.text]
        visual = inputs_embeds[:, self.start : self.stop]
        x = torch.cat([inputs_embeds[:, : self.start], inputs_embeds[:, self.stop :]], 1)
        b, n = x.shape[:2]
        cut = self.start

        def norm(y: Tensor, module) -> Tensor:
            return F.rms_norm(y, (y.shape[-1],), module.weight, config.rms_norm_eps)

        def turn(y: Tensor, c: Tensor, s: Tensor) -> Tensor:
            return y * c.unsqueeze(1) + torch.cat((-y[..., dim // 2 :], y[..., : dim // 2]), -1) * s.unsqueeze(1)

        for i, layer in enumerate(decoder.layers):
            attention = layer.self_attn
            h = norm(x, layer.input_layernorm)
            q = turn(attention.q_proj(h).view(b, n, heads, dim).transpose(1, 2), cos_t, sin_t)
            if i in self.reading:
                v0 = norm(visual, layer.input_layernorm)
                h = torch.cat([h[:, :cut], v0, h[:, cut:]], 1)
                c, s, mask, causal = cos, sin, self.mask, False
            else:
                c, s, mask, causal = cos_t, sin_t, None, True
            k = turn(attention.k_proj(h).view(b, -1, kv, dim).transpose(1, 2), c, s)
            v = attention.v_proj(h).view(b, -1, kv, dim).transpose(1, 2)
            if kv < heads and mask is not None and q.is_cuda:
                k, v = k.repeat_interleave(heads // kv, 1), v.repeat_interleave(heads // kv, 1)
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=k.shape[1] < heads
            )
            x = x + attention.o_proj(mixed.transpose(1, 2).reshape(b, n, -1))
            x = x + layer.mlp(norm(x, layer.post_attention_layernorm))
        return model.lm_head(norm(x[:, -1:], decoder.norm))


def interleave(
    arms: dict[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    gave: dict[str, object] | None = None,
    at_most: Mapping[str, int] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each arm, one after the other in every round, so that drifts of the machine hit all alike.

    `gave` is filled with what each arm returned last. Arms in `at_most` are slow, and run in the first so many rounds alone.
    """
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    last = {name: min(rounds, (at_most or {}).get(name, rounds)) - 1 for name in arms}
    with torch.no_grad():
        for round_ in range(-warm_up, rounds):
            for name, arm in arms.items():
                if round_ > last[name]:
                    continue
                synchronize()
                begin = time.perf_counter()
                out = arm()
                synchronize()
                if round_ >= 0:
                    seconds[name].append(time.perf_counter() - begin)
                if gave is not None and round_ == last[name]:
                    gave[name] = out
                del out
    return seconds


def ratio(seconds: dict[str, list[float]], above: str, below: str) -> float:
    """Median over the rounds that ran both of one arm's time over another's."""
    return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=False))
