"""Tiny seeded models of each family (nothing is downloaded) and batches with padding, several pictures, text-only rows."""

import functools

import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

IMAGE = 96
PATCHES = 9


def _text_config(layers, attention):
    return LlamaConfig(
        vocab_size=97,
        hidden_size=42,
        intermediate_size=61,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=10,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
        attn_implementation=attention,
    )


@functools.cache
def llama(attention="sdpa", layers=3):
    """A 3-layer Llama with grouped-query attention."""
    torch.manual_seed(0)
    return LlamaForCausalLM(_text_config(layers, attention)).eval()


@functools.cache
def llava(attention="sdpa", layers=4):
    """A 4-layer LLaVA-1.5 whose pictures are 3x3 tokens."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=2, image_size=30, patch_size=10
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=_text_config(layers, attention),
        image_token_id=IMAGE,
        attn_implementation={"text_config": attention, "vision_config": "sdpa"},
    )
    return LlavaForConditionalGeneration(config).eval()


def _pad(rows, side):
    length = max(map(len, rows))
    if side == "none":
        rows = [(row * length)[:length] for row in rows]
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        at = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def text_batch(side):
    """Three rows of 17, 12 and 7 tokens."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 90, (n,), generator=generator).tolist() for n in (17, 12, 7)]
    return _pad(rows, side)


def llava_batch(side):
    """Two pictures; one picture at the start; one picture; text alone. `none` pads nothing: two rows of one picture each."""
    picture = [IMAGE] * PATCHES
    if side == "none":
        rows = [[3, 4, *picture, 5, 6, 7], [8, *picture, 9, 10, 11, 12]]
    else:
        rows = [[3, 4, 5, *picture, 7, 8, 9, *picture, 11, 12], [*picture, 5, 6], [5, *picture, 6, 7], [5, 6, 7, 8, 9]]
    pictures = sum(row.count(IMAGE) for row in rows) // PATCHES
    pixels = torch.randn(pictures, 3, 30, 30, generator=torch.Generator().manual_seed(2))
    return {**_pad(rows, side), "pixel_values": pixels}


CASES = [(llama, text_batch), (llava, llava_batch)]


WINDOW = 5
SIZES = {
    "vocab_size": 97,
    "hidden_size": 42,
    "intermediate_size": 61,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
SLIDING, FULL = "sliding_attention", "full_attention"
TEXT_FAMILIES = {
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "mistral-full": ("Mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": (
        "Qwen3",
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": [SLIDING, FULL, SLIDING]},
    ),
    "gemma2": (
        "Gemma2",
        {
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 7.0,
            "query_pre_attn_scalar": 17,
            "attention_bias": True,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "sliding_window": WINDOW,
            "layer_types": [SLIDING, FULL, SLIDING],
            "query_pre_attn_scalar": 17,
            "num_key_value_heads": 1,
        },
    ),
    "smollm3": (
        "SmolLM3",
        {
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 0, 1, 0],
            "layer_types": [FULL, SLIDING, FULL, FULL],
            "use_sliding_window": True,
            "sliding_window": WINDOW,
        },
    ),
    "phi3": (
        "Phi3",
        {"sliding_window": WINDOW, "rope_parameters": {"partial_rotary_factor": 0.6, "rope_type": "default"}},
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "num_experts": 7,
            "num_experts_per_tok": 2,
            # The grouped product wants strides of 16 bytes.
            "hidden_size": 44,
            "moe_intermediate_size": 20,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
}
"""Name -> class prefix and what the config has beyond `SIZES`: every kind of layer, and windows that bite."""


@functools.cache
def text_family(name, attention="sdpa", **changes):
    """A tiny model of a text family; its norms and biases are random, so that leaving one out shows."""
    prefix, extra = TEXT_FAMILIES[name]
    config_class = getattr(transformers, f"{prefix}{'Text' if prefix == 'Gemma3' else ''}Config")
    if prefix == "Gemma2":
        attention = "eager"
    torch.manual_seed(0)
    config = config_class(**{**SIZES, **extra, **changes}, attn_implementation=attention)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
    return model
