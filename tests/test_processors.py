"""Vision families behind their own processors: loaded without torchvision, mapped as the processor says, and run by policies."""

import json
import shutil

import pytest
import torch

import processors as cases
import sparing
from processors import CASES, family, made
from sparing.anatomy import loading, pictures_only
from sparing.policies import DropTokens, FastV, ViCA
from sparing.tokens import Group

families = pytest.mark.parametrize("name", CASES)
VIDEOS = [name for name in CASES if name != "llava"]
POLICIES = {
    "ViCA": lambda: ViCA([1]),
    "DropTokens": lambda: DropTokens(groups=[Group.IMAGE], keep=0.5, seed=0),
    "FastV": lambda: FastV(1, 0.5),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """`name -> model, processor`, as `sparing.load` reads them from a folder."""
    known = {}

    def load(name):
        if name not in known:
            folder = tmp_path_factory.mktemp("processors") / name
            for part in family(name):
                part.save_pretrained(folder)
            known[name] = (*sparing.load(folder), folder)
        return known[name]

    return load


def expected(name, processor, model, inputs):
    """Spans `(start, stop, grid)` of each row, counted from ids and the processor's outputs alone; no grid where it has newlines."""
    ids = inputs["input_ids"]
    token = getattr(model.config, "image_token_id", None) or model.config.image_token_index
    runs = []
    for row in (ids == token).int():
        edge = torch.diff(row, prepend=row.new_zeros(1), append=row.new_zeros(1))
        starts, stops = ((edge == way).nonzero().flatten().tolist() for way in (1, -1))
        runs.append(list(zip(starts, stops, strict=True)))
    if name == "llava":
        return [[(*run, (3, 3)) for run in row] for row in runs]
    if name in ("qwen2_5_vl", "qwen3_vl"):
        merge = processor.image_processor.merge_size
        grids = iter([(h // merge, w // merge) for _, h, w in inputs["image_grid_thw"].tolist()])
        return [[(*run, next(grids)) for run in row] for row in runs]
    if name == "onevision":
        sizes, found = iter(inputs["image_sizes"].tolist()), []
        for row in runs:
            found.append([])
            for start, stop in row:
                # Several pictures in a row are not tiled: an overview and a newline each.
                tiled = processor._get_number_of_features(*next(sizes), 30, 30)
                count = tiled if len(row) == 1 else 10
                assert stop - start == count
                found[-1].append((start, stop, None))
        return found
    # Tiles of 2x2 tokens: one run after the other for InternVL, each with marks around it for SmolVLM.
    tiles = [[(at, at + 4, (2, 2)) for start, stop in row for at in range(start, stop, 4)] for row in runs]
    pixels = inputs["pixel_values"].flatten(0, -4) if name == "smolvlm" else inputs["pixel_values"]
    assert sum(map(len, tiles)) == int(pixels.flatten(1).any(1).sum())
    return tiles


@families
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_map_is_what_the_processor_made(name, side, loaded):
    model, processor, _ = loaded(name)
    inputs = made(name, processor, side)
    before = cases.inputs(name, side)
    assert set(inputs) == set(before)
    assert all(torch.equal(inputs[key], before[key]) for key in inputs)
    tokens = sparing.TokenMap.from_inputs(model, inputs)
    token = getattr(model.config, "image_token_id", None) or model.config.image_token_index
    assert torch.equal(tokens.of(Group.IMAGE), inputs["input_ids"] == token)
    assert torch.equal(tokens.valid, inputs["attention_mask"].bool())
    assert not tokens.images[1]
    assert len({span.grid for span in tokens.images[0]} | {len(tokens.images[0])}) > 1
    for row, spans in zip(expected(name, processor, model, inputs), tokens.images, strict=True):
        assert [(span.start, span.stop) for span in spans] == [run[:2] for run in row]
        for (start, stop, grid), span in zip(row, spans, strict=True):
            patches = span.patches()
            assert grid is None or tuple(patches.shape) == grid
            assert start <= int(patches.min()) <= int(patches.max()) < stop


def decoded(model, inputs, policy, execute):
    """Logits of the prompt, and three greedy tokens through the cache."""
    with torch.inference_mode(), sparing.apply(model, policy, execute=execute) as run:
        logits = model(**inputs).logits
        more = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    return logits, more[:, inputs["input_ids"].shape[1] :], run


@families
@pytest.mark.parametrize("policy", POLICIES)
def test_both_executors_agree_on_processed_pictures(name, policy, loaded):
    model, processor, _ = loaded(name)
    for side in ("left", "right"):
        inputs = made(name, processor, side)
        mask = inputs["attention_mask"].bool()
        with torch.inference_mode():
            stock = model(**inputs).logits
        (dense, tokens, _), (fast, same, run) = (
            decoded(model, inputs, POLICIES[policy](), execute) for execute in ("dense", "gathered")
        )
        assert (fast - dense)[mask].abs().max() <= 1e-5 * dense[mask].abs().max()
        assert torch.equal(tokens, same)
        # It did something to rows with pictures, and nothing to the one without.
        changed = [(fast[r] - stock[r])[mask[r]].abs().max() > 1e-4 * stock[mask].abs().max() for r in range(4)]
        assert changed == [True, False, True, True]
        assert run.ledger.cost().total < run.ledger.dense_cost().total


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_are_refused_where_their_library_is_missing(name, loaded):
    if loading.is_torchvision_available():
        pytest.skip("torchvision is here: videos work")
    _, processor, folder = loaded(name)
    text = f"{processor.video_token} What happens?"
    with pytest.raises(ValueError, match="videos need torchvision, which is not installed here: pass pictures"):
        processor(text=[text], videos=[torch.zeros(2, 3, 40, 40).byte().numpy()], return_tensors="pt")
    # What the checkpoint says of videos is kept for others.
    processor.save_pretrained(folder.parent / f"{name}-again")
    again, first = (
        json.loads((at / "processor_config.json").read_text()) for at in (folder.parent / f"{name}-again", folder)
    )
    assert again == first
    assert first["video_processor"]["video_processor_type"].endswith("VideoProcessor")


def test_the_files_of_older_checkpoints(loaded, tmp_path):
    """One file a part, and image processors by their former names."""
    _, processor, folder = loaded("qwen2_5_vl")
    shutil.copytree(folder, tmp_path / "older")
    merged = tmp_path / "older" / "processor_config.json"
    parts = json.loads(merged.read_text())
    merged.unlink()
    settings = parts["image_processor"] | {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    merged.with_name("preprocessor_config.json").write_text(json.dumps(settings))
    _, read = sparing.load(tmp_path / "older")
    assert type(read).__name__ == "Qwen2_5_VLProcessor"
    one, two = (made("qwen2_5_vl", this, "left") for this in (processor, read))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_missing_package_is_one_line(loaded, monkeypatch):
    _, _, folder = loaded("smolvlm")

    def without(*_, **__):
        raise ImportError(
            "Package `num2words` is required to run SmolVLM processor. Install it with `pip install num2words`."
        )

    monkeypatch.setattr(loading, "load_pictures_only", without)
    monkeypatch.setattr(loading.AutoProcessor, "from_pretrained", without)
    with pytest.raises(
        ValueError, match="its processor needs num2words, which is not installed: pip install num2words"
    ):
        sparing.load(folder)


def test_processors_that_cannot_be_put_together_are_none(loaded, tmp_path):
    """Neither processor files nor a tokenizer: the model alone, as for text."""
    model, _, _ = loaded("internvl")
    model.save_pretrained(tmp_path)
    assert sparing.load(tmp_path)[1] is None
    with pytest.raises((OSError, ValueError)):
        pictures_only.load_pictures_only(str(tmp_path))
