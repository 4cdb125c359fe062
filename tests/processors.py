"""Each vision family with its own processor, small but real: a byte-level tokenizer, the family's image processor and a chat template.

Nothing is downloaded. Video processors need torchvision, which is not here: `NoVideos` keeps their settings.
"""

import functools

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

import vision_models as tiny
from sparing.anatomy.pictures_only import NoVideos, pictures_only

WORDS = (
    "What is in this picture? Describe the two pictures. The ferry left at six, an hour late, with two cars on its deck. "
    "A red square, a blue circle and a green triangle: which one is larger? It is the circle that is larger. "
) * 4
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}PICTURE{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{{ m.role | upper }}: {% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tokenizer(special=(), named=None, template=None):
    """Byte-level BPE with 40 merges: reads everything; `special` tokens are one piece each, `named` ones attributes too."""
    backend = Tokenizer(token_models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    first = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=len(first) + 256 + 40,
        special_tokens=first,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([WORDS], trainer)
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        chat_template=template,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=named or {},
    )


def text_config(words, **more):
    """The decoder's settings for a tokenizer."""
    room = {"vocab_size": len(words), "max_position_embeddings": 1024}
    return {**tiny.TEXT, **room, **more}


def build(model, config):
    """A seeded model in eval mode."""
    torch.manual_seed(0)
    return model(config).eval()


def llava():
    """LLaVA-1.5: shortest edge and centre crop, 3x3 tokens a picture."""
    words = tokenizer(["<image>"], template=VICUNA)
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}),
        words,
        patch_size=10,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**tiny.VISION, image_size=30, patch_size=10),
        text_config=transformers.LlamaConfig(**text_config(words)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )
    return build(transformers.LlavaForConditionalGeneration, config), processor


def onevision():
    """LLaVA-OneVision: an overview and up to 2x2 tiles of 3x3 tokens, scaled down beyond 3 tiles' worth."""
    template = CHATML.replace("PICTURE", "<image>\n")
    words = tokenizer(["<image>", "<video>", "<|im_start|>", "<|im_end|>"], template=template)
    points = [[30, 30], [30, 60], [60, 30], [60, 60]]
    processor = pictures_only(transformers.LlavaOnevisionProcessor)(
        transformers.LlavaOnevisionImageProcessorPil(size={"height": 30, "width": 30}, image_grid_pinpoints=points),
        words,
        NoVideos({"video_processor_type": "LlavaOnevisionVideoProcessor", "size": {"height": 30, "width": 30}}),
        num_image_tokens=9,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_3",
        chat_template=template,
    )
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(
            **tiny.VISION, image_size=30, patch_size=10, vision_use_head=False
        ),
        text_config=transformers.Qwen2Config(**text_config(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=points,
        vision_aspect_ratio="anyres_max_3",
    )
    return build(transformers.LlavaOnevisionForConditionalGeneration, config), processor


def internvl():
    """InternVL: one to four tiles of 2x2 tokens, and a thumbnail where there are several."""
    template = CHATML.replace("PICTURE", "<IMG_CONTEXT>\n")
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = tokenizer([*named.values(), "<|im_start|>", "<|im_end|>"], named, template)
    processor = pictures_only(transformers.InternVLProcessor)(
        transformers.GotOcr2ImageProcessorPil(
            size={"height": 40, "width": 40}, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        words,
        NoVideos({"video_processor_type": "InternVLVideoProcessor", "size": {"height": 40, "width": 40}}),
        image_seq_length=4,
        chat_template=template,
    )
    config = transformers.InternVLConfig(
        vision_config={**tiny.VISION, "image_size": 40, "patch_size": 10},
        text_config=transformers.Qwen2Config(**text_config(words)),
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    return build(transformers.InternVLForConditionalGeneration, config), processor


def smolvlm():
    """SmolVLM: tiles of 2x2 tokens named by row and column, and an overview."""
    marks = ["<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>", "<|im_start|>", "<video>"]
    named = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
        "video_token": "<video>",
    }
    words = tokenizer([*marks, *(f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4))], named)
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

    processor = pictures_only(transformers.SmolVLMProcessor)(
        transformers.SmolVLMImageProcessorPil(
            size={"longest_edge": 120}, max_image_size={"longest_edge": 40}, do_image_splitting=True
        ),
        words,
        NoVideos({"video_processor_type": "SmolVLMVideoProcessor", "size": {"longest_edge": 40}}),
        image_seq_len=4,
        chat_template=DEFAULT_CHAT_TEMPLATE,
    )
    config = transformers.SmolVLMConfig(
        vision_config={**tiny.VISION, "image_size": 40, "patch_size": 10},
        text_config=transformers.LlamaConfig(**text_config(words)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return build(transformers.SmolVLMForConditionalGeneration, config), processor


def _qwen(processor_class, **settings):
    template = CHATML.replace("PICTURE", "<|vision_start|><|image_pad|><|vision_end|>")
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = tokenizer(special, template=template)
    pixels = {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}
    processor = pictures_only(processor_class)(
        transformers.Qwen2VLImageProcessorPil(size=pixels, patch_size=4, merge_size=2, temporal_patch_size=2),
        words,
        NoVideos({"video_processor_type": settings.pop("videos"), "size": pixels}),
        chat_template=template,
    )
    ids = {
        f"{name}_token_id": words.convert_tokens_to_ids(word)
        for name, word in (
            ("image", "<|image_pad|>"),
            ("video", "<|video_pad|>"),
            ("vision_start", "<|vision_start|>"),
            ("vision_end", "<|vision_end|>"),
        )
    }
    return words, processor, ids


def qwen2_5_vl():
    """Qwen2.5-VL: pictures of 4 to 16 tokens."""
    words, processor, ids = _qwen(transformers.Qwen2_5_VLProcessor, videos="Qwen2VLVideoProcessor")
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 2]}
    config = transformers.Qwen2_5_VLConfig(
        vision_config={**tiny.QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
        text_config=text_config(words, rope_parameters=rope),
        **ids,
    )
    return build(transformers.Qwen2_5_VLForConditionalGeneration, config), processor


def qwen3_vl():
    """Qwen3-VL: pictures of 4 to 16 tokens."""
    words, processor, ids = _qwen(transformers.Qwen3VLProcessor, videos="Qwen3VLVideoProcessor")
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 1], "mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(
        vision_config={**tiny.QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        text_config=text_config(words, head_dim=10, rope_parameters=rope),
        **ids,
    )
    return build(transformers.Qwen3VLForConditionalGeneration, config), processor


CASES = {
    "llava": llava,
    "onevision": onevision,
    "internvl": internvl,
    "smolvlm": smolvlm,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
}


@functools.cache
def family(name):
    """A model and its processor, made once; skips the test where an older transformers has none for pictures alone."""
    try:
        return CASES[name]()
    except ImportError as error:
        if _version(transformers.__version__) >= (5, 23):
            raise
        pytest.skip(f"the {name} processor of transformers {transformers.__version__}: {' '.join(str(error).split())}")


def _version(text):
    return tuple(int(part) for part in text.split(".")[:2])


def picture(width, height, seed=0):
    """Noise over a gradient."""
    draw = np.random.default_rng(seed)
    ramp = np.linspace(0, 160, width)[None, :, None] + np.zeros((height, 1, 3))
    return Image.fromarray((ramp + draw.integers(0, 90, (height, width, 3))).astype(np.uint8))


def prompt(processor, question, pictures=0, before=()):
    """A chat with its pictures first; `before` are turns in front of it."""
    content = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": question}]
    turns = [*before, {"role": "user", "content": content}]
    return processor.apply_chat_template(turns, add_generation_prompt=True)


def chat(processor):
    """Rows of two pictures, none, one wide, and one small in an earlier turn; pictures of different sizes."""
    earlier = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in this picture?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A red square."}]},
    ]
    return (
        [
            prompt(processor, "Which one is larger?", 2),
            prompt(processor, "What is the capital of France?"),
            prompt(processor, "Describe it.", 1),
            prompt(processor, "Are you sure?", 0, earlier),
        ],
        [[picture(64, 40, 1), picture(33, 90, 2)], [], [picture(120, 31, 3)], [picture(20, 20, 4)]],
    )


def inputs(name, side="left"):
    """The chat as the family's processor makes it, padded on a side."""
    return made(name, family(name)[1], side)


def made(name, processor, side):
    """The chat as a processor makes it."""
    if name == "internvl" and _version(np.__version__) < (2, 1):
        pytest.skip(f"transformers' InternVLProcessor sums tensors with numpy, which numpy {np.__version__} refuses")
    texts, pictures = chat(processor)
    nested = name in ("smolvlm", "onevision")
    given = pictures if nested else [one for row in pictures for one in row]
    return processor(text=texts, images=given, padding=True, padding_side=side, return_tensors="pt")
