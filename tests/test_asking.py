"""`ask`: every vision family's own processor makes prompts that the model and its map agree on."""

import numpy as np
import pytest
import torch
from PIL import Image

import sparing
from models import llama
from processors import CASES, family
from sparing.anatomy import ask
from sparing.tokens import Group


def picture(seed, mode="RGB"):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)).convert(mode)


@pytest.mark.parametrize("name", CASES)
def test_each_family(name):
    model, processor = family(name)
    side = processor.tokenizer.padding_side
    inputs = ask(
        model, processor, ["What is it?", "Which one is larger?"], [[picture(0)], [picture(1, "RGBA"), picture(2, "L")]]
    )
    tokens = sparing.TokenMap.from_inputs(model, inputs)
    one, two = (len(row) for row in tokens.images)
    # In SmolVLM each tile of a picture is one of its own.
    assert (one, two) == (1, 2) or (name == "smolvlm" and two == 2 * one)
    assert tokens.valid[:, -1].all(), "padding goes to the left"
    assert tokens.has(Group.TEXT)
    assert torch.isfinite(model(**inputs).logits[tokens.valid]).all()
    assert processor.tokenizer.padding_side == side


def test_bad_prompts():
    model, processor = family("llava")
    with pytest.raises(ValueError, match="text alone"):
        ask(llama(), processor, ["What?"], [[picture(0)]])
    with pytest.raises(ValueError, match="no processor"):
        ask(model, processor.tokenizer, ["What?"], [[picture(0)]])
    with pytest.raises(ValueError, match="leave it out"):
        ask(model, processor, ["<image> What?"], [[picture(0)]])
    with pytest.raises(ValueError, match="go apart"):
        ask(model, processor, ["What?", "What?"], [[picture(0)], []])
    with pytest.raises(ValueError, match="2 questions"):
        ask(model, processor, ["What?", "What?"], [[picture(0)]])
    with pytest.raises(ValueError, match="does not fit"):
        ask(model, processor, ["What is it? " * 600], [[picture(0)]])
