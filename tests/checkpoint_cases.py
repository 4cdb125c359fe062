"""What the checkpoint tests share: families, a tiny tokenizer and processor, one checkpoint with two policies, refusals."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast
from transformers.utils import logging

import sparing
from models import llama, llava, llava_batch, text_batch
from sparing.policies import SkipGPT, SkipModules

logging.disable_progress_bar()

FAMILIES = {"llama": (llama, text_batch), "llava": (llava, llava_batch)}


def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 96)}, "<image>": 96}
    inner = Tokenizer(WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return made


def processor():
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
    return LlavaProcessor(
        pictures, tokenizer(), patch_size=10, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def save_skipping(directory, model=None, **arguments):
    """One checkpoint with a policy that learns and one that does not."""
    model = model or llama()
    torch.manual_seed(3)
    policies = [SkipGPT.for_model(model), SkipModules(mlp=[1])]
    sparing.save(model, directory, policies, **arguments)
    return policies


def files_of(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def refuses(path, *words, **kwargs):
    with pytest.raises(ValueError) as caught:
        sparing.load(path, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
