"""Vision families: the `TokenMap` of several pictures, tiles, newlines and axes of positions, and what is refused."""

import inspect

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sparing
import sparing.anatomy
from sparing.tokens import Group
from vision_models import FAMILIES, IMAGE, QWEN, onevision

families = pytest.mark.parametrize("family", FAMILIES)


@families
@pytest.mark.parametrize("side", ["left", "right"])
def test_token_map(family, side):
    """Groups, and a span a picture (or tile) whose patches are image tokens and no newlines."""
    build, batch = FAMILIES[family]
    inputs = batch(side)
    tokens = sparing.TokenMap.from_inputs(build(), inputs)
    is_image = inputs["input_ids"] == IMAGE
    assert torch.equal(tokens.valid, inputs["attention_mask"].bool())
    assert torch.equal(tokens.of(Group.IMAGE), is_image)
    assert tokens.of(Group.SYSTEM).sum(1).tolist() == ([4, 0, 1, 2] if family in QWEN else [3, 0, 0, 1])
    assert tokens.images[0]
    assert not tokens.images[1]
    for row, spans in enumerate(tokens.images):
        assert sum(span.stop - span.start for span in spans) == is_image[row].sum()
        for span in spans:
            patches = span.patches()
            assert tuple(patches.shape) == span.grid
            assert patches.min() >= span.start
            assert patches.max() < span.stop
            assert is_image[row, span.start : span.stop].all()


@pytest.mark.parametrize("most", [1, 9])
@pytest.mark.parametrize(
    "size", [(30, 30), (17, 55), (59, 9), (29, 60), (58, 31), (60, 60), (53, 44), (9, 59), (100, 7)]
)
def test_onevision_layout_is_the_models(size, most, monkeypatch):
    """As many tokens as the model makes; the ones behind the overview that are no patches are its newline."""
    model = onevision()
    monkeypatch.setattr(model.config, "vision_aspect_ratio", f"anyres_max_{most}")
    sizes = torch.tensor([size])
    with torch.no_grad():
        pixels = torch.randn(1, 5, 3, 30, 30)
        features = model.model.get_image_features(pixels, sizes, return_dict=True).pooler_output[0]
    ids = torch.tensor([[3, *[IMAGE] * len(features), 4]])
    (span,) = sparing.TokenMap.from_inputs(model, {"input_ids": ids, "image_sizes": sizes}).images[0]
    newline = (features == model.model.image_newline).all(1)
    expected = torch.zeros(len(features), dtype=torch.bool)
    expected[span.offset :] = True
    expected[span.patches().flatten() - 1] = False
    assert torch.equal(newline, expected)


@pytest.mark.parametrize("family", QWEN)
def test_mrope_positions_are_the_models(family):
    """The map holds the three axes that the decoder gets."""
    build, batch = FAMILIES[family]
    model, inputs = build(), batch("left")
    expected, _ = model.model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    assert torch.equal(sparing.TokenMap.from_inputs(model, inputs).position_ids, expected)


@families
def test_map_refusals(family):
    """Image tokens that make no whole pictures, or other pictures than described; videos."""
    build, batch = FAMILIES[family]
    model, inputs = build(), batch("right")
    opened = 3 + (family in QWEN)  # Qwen's pictures have a token that opens them
    short = {**inputs, **{name: inputs[name][:, : opened + 1] for name in ("input_ids", "attention_mask")}}
    with pytest.raises(ValueError, match=r"row 0 has 1 image tokens.*a picture"):
        sparing.TokenMap.from_inputs(model, short)
    broken = inputs["input_ids"].clone()
    broken[0, opened + 1] = 3
    with pytest.raises(ValueError, match=r"interrupted|image tokens"):
        sparing.TokenMap.from_inputs(model, {**inputs, "input_ids": broken})
    with pytest.raises(ValueError, match="videos"):
        sparing.TokenMap.from_inputs(model, {**inputs, "pixel_values_videos": torch.zeros(1)})
    with pytest.raises(ValueError, match="videos"):
        sparing.TokenMap.from_inputs(model, {**inputs, "mm_encoder_outputs": {"video": object()}})
    for name in set(sparing.anatomy.anatomy_of(model).picture_sizes) & {"image_sizes", "image_grid_thw"}:
        without = {k: v for k, v in inputs.items() if k not in (name, "mm_token_type_ids")}
        with pytest.raises(ValueError, match=f"without {name}"):
            sparing.TokenMap.from_inputs(model, without)
        counted = "batch_num_images" in inputs
        for other, words in (
            (torch.cat([inputs[name], inputs[name][-1:]]), "describe 1 more"),
            (inputs[name][:-1], "do not describe"),
        ):
            with pytest.raises(ValueError, match="batch_num_images 4" if counted else words):
                sparing.TokenMap.from_inputs(model, {**without, name: other})


@families
def test_encoder_flops_are_those_that_run(family):
    """Counted by PyTorch while pictures are encoded; only windows that a picture's edge cuts count as whole ones."""
    build, batch = FAMILIES[family]
    model, inputs = build.__wrapped__(), batch("left")
    for module in sparing.anatomy.anatomy_of(model).vision_encoder.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"  # PyTorch does not count every fused kernel
    encode = model.model.get_image_features
    given = {name: inputs[name] for name in inspect.signature(encode).parameters if name in inputs}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encode(**given, return_dict=True)
    spans = [span for row in sparing.TokenMap.from_inputs(model, inputs).images for span in row]
    ours = sum(sparing.anatomy.anatomy_of(model).picture_flops(span) for span in spans)
    if family == "qwen2_5_vl":
        assert counter.get_total_flops() < ours < 1.01 * counter.get_total_flops()
    else:
        assert counter.get_total_flops() == ours
