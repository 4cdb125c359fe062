"""The recipe on real handwritten digits and photographs: trained from a folder, never shipped."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import sparing
from real_pictures import stand_in
from sparing import zoo
from sparing.cli.zoo import zoo as commands
from sparing.worlds.real_scenes import KINDS, TASKS
from sparing.zoo.scene_batches import make_batch, normalise
from sparing.zoo.scene_course import SceneCourse
from sparing.zoo.train import train

NAME = "real-scenes-llava"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return stand_in(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def recipe():
    return zoo.recipe(NAME).shrunk()


@pytest.fixture(scope="module")
def course(recipe, pictures):
    made = SceneCourse(recipe, 3, pictures)
    made.model.eval()
    return made


def test_it_can_be_trained_but_is_not_shipped():
    assert NAME in zoo.names(shipped=False)
    assert NAME not in zoo.names()
    with pytest.raises(ValueError, match=f"sparing zoo train {NAME}"):
        zoo.path(NAME)
    listed = CliRunner().invoke(commands, ["list"], env={"COLUMNS": "200"}).output
    assert any(NAME in line and "to be trained" in line for line in listed.splitlines())


def test_without_its_pictures_it_says_what_to_name(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"mnist/train\.npz and cifar10/train\.parquet.*--data"):
        train(recipe, tmp_path / "none", bar=False)
    with pytest.raises(FileNotFoundError, match="expected MNIST in"):
        train(recipe, tmp_path / "wrong", data=tmp_path, bar=False)


def test_command_trains_and_writes_a_card(pictures, tmp_path):
    done = CliRunner().invoke(
        commands,
        ["train", NAME, "--shrink", "--out", str(tmp_path), "--device", "cpu", "--data", str(pictures)],
    )
    assert done.exit_code == 0, done.output
    figures = json.loads((tmp_path / NAME / "run.json").read_text())["figures"]
    assert set(figures["scores"]) == set(TASKS)
    assert 0 <= figures["more"]["spoken digits kind"] <= 1
    card = (tmp_path / NAME / "final" / "README.md").read_text()
    assert "MNIST" in card
    assert "handwritten digits in coloured ink" in card
    assert "spelled word" not in card
    model, processor = sparing.load(tmp_path / NAME / "final")
    assert model.config.vision_config.patch_size == 16
    assert processor.tokenizer.unk_token_id not in processor.tokenizer(" ".join(KINDS)).input_ids


def test_the_encoder_reads_crowded_scenes_and_answers_do_not(recipe, course):
    real = zoo.recipe(NAME)
    assert {stage.most for stage in real.stages if stage.goal == "patches"} == {80}
    assert {stage.most for stage in real.stages if stage.goal != "patches"} == {6}
    assert {len(stage.weights or real.weights) for stage in real.stages} == {len(TASKS)}
    batch = course.batches[0]
    assert batch["goal"] == "patches"
    assert (batch["truth"][..., 1] > 0).sum(1).max() > 6
    assert batch["truth"][..., 1].max() < len(KINDS)


def test_training_pictures_are_what_the_processor_makes_of_them(course):
    world = course.world
    drawn = [world.draw(np.random.default_rng(number), "train") for number in range(2)]
    made = course.processor.image_processor([world.picture(scene) for scene in drawn], return_tensors="pt")
    assert torch.allclose(made["pixel_values"], normalise(world.paint(drawn)), atol=1e-6)


def test_told_and_shown_scenes_hold_the_same(course, recipe):
    """The words that stand for each patch, and the classes that the probe learns, say what the picture shows."""
    world, tokenizer = course.world, course.processor.tokenizer
    scene = world.draw(np.random.default_rng(1), "train", most=40)
    asked = [world.questions(scene, np.random.default_rng(2), 5)]
    stage = replace(next(stage for stage in recipe.stages if stage.goal == "words"), bare=(100, 100))
    batch = make_batch([scene], asked, tokenizer, stage, np.random.default_rng(0), world=world)
    for words, truth in zip(batch.cell_words[0], batch.truth[0], strict=True):
        row, column, colour, kind = tokenizer.convert_ids_to_tokens(words.tolist())
        assert truth.tolist() == [
            world.colours.index(colour),
            world.kinds.index(kind),
            int(row[1:]) - 1,
            int(column[1:]) - 1,
        ]


def test_the_encoder_learns_to_tell_the_stand_ins_apart(recipe, pictures):
    """A few steps on crowded scenes already beat chance by far: data, labels and probe belong together."""
    stage = replace(recipe.stages[0], steps=60, rows=4, lr=2e-3, warmup=5)
    course = SceneCourse(replace(recipe, stages=(stage,)), 0, pictures)
    student = course.trained
    weights = [*student.model.model.vision_tower.parameters(), *student.probe.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=stage.lr)
    for number in range(stage.steps):
        optimiser.zero_grad()
        course.loss(student, course.batches[number]).backward()
        optimiser.step()
    scenes = [course.world.draw(np.random.default_rng([5, number]), "test", 40) for number in range(4)]
    with torch.inference_mode():
        colours, kinds, *_ = student.patch_logits(normalise(course.world.paint(scenes)))
    truth = np.stack([scene.truth() for scene in scenes])
    right = {
        name: logits.argmax(-1).numpy() == truth[:, part].reshape(4, -1)
        for name, logits, part in (("colour", colours, 1), ("kind", kinds, 2))
    }
    objects = truth[:, 2].reshape(4, -1) > 0
    assert right["colour"].mean() > 0.8
    assert right["kind"][objects].mean() > 0.25
