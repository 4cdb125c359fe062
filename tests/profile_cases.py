"""A tiny checkpoint with a tokenizer, and a text for it: what the profile's tests share."""

import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparing.evaluate import Profiler, Settings, TextMaterial
from sparing.worlds.vocabulary import word_tokenizer

SETTINGS = Settings(max_tokens=400, window=24, width=2, repeats=1, steps=3, batches=(1, 2))


def tokenizer():
    return word_tokenizer(["cat", "dog", "sat"], max_length=64)


def model(seed: int = 0):
    tok = tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=28,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=64,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
        # Wide enough that every module matters: with the usual 0.02 all losses are alike.
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def text(characters: int = 900, seed: int = 0) -> str:
    draw = random.Random(seed)
    return "".join(
        draw.choice([" cat", " dog", " sat", "7", " 4", ".", "\n", "é <script>x</script> "])
        for _ in range(characters // 3)
    )


def checkpoint(folder):
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def profiler(model, tokenizer, settings=SETTINGS):
    """A profile of the text that is ready to run."""
    material = TextMaterial(model, tokenizer, text(), max_tokens=settings.max_tokens, window=settings.window)
    return Profiler(material, settings)
