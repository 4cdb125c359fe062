"""Tiny seeded vision models of each family, and batches made by hand: several pictures, text alone, padding on either side."""

import functools

import torch
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from models import _pad

IMAGE, VIDEO = 96, 95
TEXT = {
    "vocab_size": 97,
    "hidden_size": 60,
    "intermediate_size": 61,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
VISION = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 60,
    "initializer_range": 0.2,
}


def _build(family, config, attention):
    torch.manual_seed(0)
    config._attn_implementation = {"text_config": attention, "vision_config": "sdpa"}
    return family(config).eval()


def _noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def rows_of(lengths, side, opening=()):
    """Two pictures; text alone; a picture first; a picture. `lengths`: image tokens of the four; `opening`: ids before each."""
    a, b, c, d = ([*opening, *[IMAGE] * n] for n in lengths)
    return _pad([[3, 4, 5, *a, 7, 8, *b, 11, 12], [5, 6, 7, 8, 9], [*c, 5, 6], [5, *d, 6, 7]], side)


@functools.cache
def onevision(attention="sdpa"):
    """LLaVA-OneVision with a Qwen2 decoder: 3x3 tokens a tile, up to 2x2 tiles."""
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION, image_size=30, patch_size=10, vision_use_head=False),
        text_config=Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[30, 30], [30, 60], [60, 30], [60, 60]],
    )
    return _build(LlavaOnevisionForConditionalGeneration, config, attention)


def onevision_batch(side):
    """Overviews alone (two in a row), and 1x2 and 2x1 tiles whose padding is cut away."""
    sizes = torch.tensor([[30, 30], [20, 30], [17, 55], [59, 9]])
    return {
        **rows_of((10, 10, 9 + 1 * 7, 9 + 6 * 2), side),
        "pixel_values": _noise(4, 3, 3, 30, 30),
        "image_sizes": sizes,
        "batch_num_images": torch.tensor([2, 0, 1, 1]),
    }


@functools.cache
def internvl(attention="sdpa"):
    """InternVL with a Qwen2 decoder: 4x4 patches and 2x2 tokens a tile."""
    config = InternVLConfig(
        vision_config={**VISION, "image_size": 40, "patch_size": 10},
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return _build(InternVLForConditionalGeneration, config, attention)


def internvl_batch(side):
    """A picture of three tiles and one of one; text; two tiles; one."""
    return {**rows_of((12, 4, 8, 4), side), "pixel_values": _noise(7, 3, 40, 40)}


@functools.cache
def smolvlm(attention="sdpa"):
    """SmolVLM: 4x4 patches and 2x2 tokens a tile."""
    config = SmolVLMConfig(
        vision_config={**VISION, "image_size": 40, "patch_size": 10},
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return _build(SmolVLMForConditionalGeneration, config, attention)


def smolvlm_batch(side):
    """Tiles a row: three, none, two, one; the others are zeros."""
    pixels = _noise(4, 3, 3, 40, 40)
    for row, count in enumerate((3, 0, 2, 1)):
        pixels[row, count:] = 0
    return {**rows_of((4, 8, 8, 4), side), "pixel_values": pixels}


def _qwen_batch(side):
    """Merged grids of 2x3, 1x2, 3x2 and 2x2."""
    grids = torch.tensor([[1, 4, 6], [1, 2, 4], [1, 6, 4], [1, 4, 4]])
    # Before 5.18 `generate` tells the pictures of a row by their opening token.
    batch = rows_of((6, 2, 6, 4), side, [QWEN_IDS["vision_start_token_id"]])
    return {
        **batch,
        "pixel_values": _noise(int(grids.prod(1).sum()), 3 * 2 * 4 * 4),
        "image_grid_thw": grids,
        "mm_token_type_ids": (batch["input_ids"] == IMAGE).long(),
    }


QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 93, "vision_end_token_id": 94}


@functools.cache
def qwen2_5_vl(attention="sdpa"):
    """Qwen2.5-VL: 2x2 patches a token, windows of 2x2 tokens in its first layer, three axes of positions."""
    config = Qwen2_5_VLConfig(
        vision_config={**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
        text_config={
            **TEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 2]},
        },
        **QWEN_IDS,
    )
    return _build(Qwen2_5_VLForConditionalGeneration, config, attention)


@functools.cache
def qwen3_vl(attention="sdpa"):
    """Qwen3-VL: features of both encoder layers are added after the first two layers."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 1], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        vision_config={**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        text_config={**TEXT, "head_dim": 10, "rope_parameters": rope},
        **QWEN_IDS,
    )
    return _build(Qwen3VLForConditionalGeneration, config, attention)


def _llava(text, attention, vision=None, **settings):
    vision = vision or CLIPVisionConfig(**VISION, image_size=30, patch_size=10)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, **settings)
    return _build(LlavaForConditionalGeneration, config, attention)


@functools.cache
def llava_qwen2(attention="sdpa"):
    """LLaVA-1.5 around a Qwen2 decoder."""
    return _llava(Qwen2Config(**TEXT), attention)


@functools.cache
def llava_mistral(attention="sdpa"):
    """LLaVA-1.5 around a Mistral decoder whose window is shorter than a prompt."""
    return _llava(MistralConfig(**TEXT, head_dim=10, sliding_window=11), attention)


@functools.cache
def llava_siglip(attention="sdpa"):
    """LLaVA-1.5 around a SigLIP encoder: no class token, so that all positions are patches."""
    vision = SiglipVisionConfig(**VISION, image_size=30, patch_size=10, vision_use_head=False)
    whole = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    return _llava(LlamaConfig(**TEXT), attention, vision, **whole)


def llava_batch(side):
    """Pictures of 3x3 tokens."""
    return {**rows_of((9, 9, 9, 9), side), "pixel_values": _noise(4, 3, 30, 30)}


FAMILIES = {
    "llava_onevision": (onevision, onevision_batch),
    "internvl": (internvl, internvl_batch),
    "smolvlm": (smolvlm, smolvlm_batch),
    "qwen2_5_vl": (qwen2_5_vl, _qwen_batch),
    "qwen3_vl": (qwen3_vl, _qwen_batch),
    "llava-qwen2": (llava_qwen2, llava_batch),
    "llava-mistral": (llava_mistral, llava_batch),
}
QWEN = ("qwen2_5_vl", "qwen3_vl")


def decoded(model, inputs, extra):
    """Logits of a prompt, a chunk of three and single tokens, at the model's positions; and the cache."""
    out = model(**inputs, use_cache=True)
    logits, mask = [out.logits], inputs["attention_mask"]
    position, deltas = mask.sum(1, keepdim=True), getattr(model.model, "rope_deltas", None)
    for chunk in (extra[:, :3], *extra[:, 3:].split(1, dim=1)):
        n = chunk.shape[1]
        mask = torch.cat([mask, torch.ones(len(mask), n, dtype=mask.dtype)], dim=1)
        ids = position + torch.arange(n)
        position = position + n
        ids = ids if deltas is None else (ids + deltas).expand(3, -1, -1)
        out = model(chunk, attention_mask=mask, position_ids=ids, past_key_values=out.past_key_values)
        logits.append(out.logits)
    return logits, out.past_key_values
