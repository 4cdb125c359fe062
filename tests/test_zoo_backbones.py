"""Families that learn scenes: what is trained on packed questions is what the model does with its processor's prompt."""

import json

import numpy as np
import pytest
import torch
import torch.fx.experimental._config
from typer.testing import CliRunner

import sparing
from sparing import zoo
from sparing.anatomy import ask
from sparing.cli.zoo import zoo as commands
from sparing.tokens import TokenMap
from sparing.worlds.scenes import WORLD
from sparing.zoo.scene_batches import IGNORED, SceneBatch, make_batch
from sparing.zoo.scene_course import SceneCourse
from sparing.zoo.scene_eyes import eyes_of

NAMES = ("scenes-llava", "scenes-onevision", "scenes-internvl")


@pytest.fixture(scope="module", params=NAMES)
def course(request):
    made = SceneCourse(zoo.recipe(request.param).shrunk(), 3)
    made.model.eval()
    return made


def test_packed_training_is_the_prompt(course):
    """Logits of the first answer word: two questions packed in a row, against each asked alone through the processor."""
    examples = WORLD.examples("test", 1, 0)[:3]
    scenes, rng = [example.scene for example in examples], np.random.default_rng(0)
    asked = [[example.question, WORLD.ask(example.scene, rng, "background")] for example in examples]
    batch = make_batch(scenes, asked, course.processor.tokenizer, course.recipe.stages[-1], rng)
    with torch.inference_mode():
        logits, _ = course.trained.answer_logits(batch)
        rows = (batch.targets != IGNORED).nonzero()
        for place in (0, 1):
            texts = [questions[place].text for questions in asked]
            inputs = ask(course.model, course.processor, texts, [[WORLD.picture(scene)] for scene in scenes])
            alone = course.model(**inputs, logits_to_keep=1).logits[:, -1]
            for row in range(3):
                mine = (rows[:, 0] == row) & (batch.segments[rows[:, 0], rows[:, 1]] == place + 1)
                first = int(mine.nonzero()[0])
                torch.testing.assert_close(logits[first], alone[row], atol=1e-5, rtol=1e-5)


def test_patches_are_where_the_token_map_says(course):
    example = WORLD.examples("test", 1, 0)[0]
    inputs = ask(course.model, course.processor, [example.question.text], [[WORLD.picture(example.scene)]])
    (span,) = TokenMap.from_inputs(course.model, inputs).images[0]
    eyes = eyes_of(course.recipe, WORLD)
    assert span.stop - span.start == eyes.number
    assert span.patches().flatten().tolist() == (eyes.places() + span.start).tolist()


def test_every_stage_runs_on_another_device_than_the_cpu(monkeypatch):
    """On the meta device, which says no less about where tensors are than a GPU does."""
    monkeypatch.setattr(torch.fx.experimental._config, "meta_nonzero_assume_all_nonzero", True)
    for name in NAMES:
        made = SceneCourse(zoo.recipe(name).shrunk(), 3)
        batches = {batch["goal"]: batch for batch in (made.batches[step] for step in range(len(made.batches)))}
        student = made.trained.to("meta")
        for goal, batch in batches.items():
            loss = made.loss(student, SceneBatch(**batch).to(torch.device("meta"))._asdict())
            loss.backward()
            assert loss.device.type == "meta", (name, goal)


@torch.inference_mode()
def test_what_the_projector_reads_of_a_patch_is_about_that_patch(course):
    """Where the encoder's attention gives nothing, only the patch's own pixels move what is read of it."""
    inner = course.model.model
    eyes = eyes_of(course.recipe, WORLD)
    outs = [w for name, w in inner.vision_tower.named_parameters() if "out_proj" in name or "projection_layer" in name]
    kept = [weight.clone() for weight in outs]
    assert outs
    try:
        for weight in outs:
            weight.zero_()
        pixels = torch.zeros(1, 3, 80, 80)
        marked = pixels.clone()
        marked[:, :, 24:32, 56:64] = 1.0
        moved = (eyes.seen(inner, pixels) - eyes.seen(inner, marked)).abs().amax(-1)[0]
    finally:
        for weight, before in zip(outs, kept, strict=True):
            weight.copy_(before)
    assert moved.nonzero().flatten().tolist() == [37]
    assert eyes.seen(inner, pixels).shape[-1] == eyes.width


def test_one_is_trained_and_reloads(tmp_path):
    done = CliRunner().invoke(
        commands, ["train", "scenes-onevision", "--shrink", "--out", str(tmp_path), "--device", "cpu"]
    )
    assert done.exit_code == 0, done.output
    folder = tmp_path / "scenes-onevision"
    assert json.loads((folder / "run.json").read_text())["figures"]["scores"]["shape"]
    card = (folder / "final" / "README.md").read_text()
    assert "SigLIP-style encoder" in card
    assert "Qwen2 (" in card
    model, processor = sparing.load(folder / "final")
    assert model.config.model_type == "llava_onevision"
    assert ask(model, processor, ["what word ?"], [[WORLD.picture(next(WORLD.stream("test", 0)))]])[
        "input_ids"
    ].shape == (1, 214)
