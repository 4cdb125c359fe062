"""Tiny seeded models of each family (nothing is downloaded) and batches with padding, several pictures, text-only rows."""

import functools

import torch
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
