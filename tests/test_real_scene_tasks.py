"""The studies' tasks and training on scenes of a folder's pictures."""

import json

import numpy as np
import pytest
import torch

from real_pictures import stand_in
from sparing import zoo
from sparing.evaluate.task import NotApplicable, Subject
from sparing.evaluate.tasks.scene_lens import SceneLensTask
from sparing.evaluate.tasks.scene_transplant import SceneTransplantTask, drawn_pairs
from sparing.evaluate.tasks.scenes import ScenesTask
from sparing.study.methods.tokens import TokenClass, profile_of
from sparing.study.trainings.scenes import SceneTraining
from sparing.worlds.opening import scene_files, scene_world
from sparing.worlds.real_scenes import DIGITS, TASKS
from sparing.zoo.scene_course import SceneCourse


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stand_in(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def subject(folder):
    made = SceneCourse(zoo.recipe("real-scenes-llava").shrunk(), 3, folder)
    return Subject(made.model.eval(), made.processor)


def test_a_world_is_opened_once_and_its_files_are_named(folder, monkeypatch):
    assert scene_world(folder) is scene_world(folder)
    monkeypatch.chdir(folder.parent)
    assert scene_world(folder.relative_to(folder.parent)) is scene_world(folder)
    assert all(file.is_file() for file in scene_files(folder))
    assert scene_files() == ()


def test_a_wrong_folder_is_told_before_anything_begins(tmp_path):
    for task in (ScenesTask(data=tmp_path), SceneLensTask(data=tmp_path), SceneTransplantTask(data=tmp_path)):
        with pytest.raises(ValueError, match="expected MNIST in"):
            task.check()
    with pytest.raises(ValueError, match="expected MNIST in"):
        SceneTraining(data=tmp_path).check()


def test_questions_are_those_of_the_world(subject, folder):
    found = ScenesTask(per_task=1, data=folder).measure(subject, seed=0)
    assert set(TASKS) < set(found.figures)
    assert {answer["prompt"] for answer in found.details["answers"]} == {
        example.question.text for example in scene_world(folder).examples("test", 1, 1)
    }
    with pytest.raises(ValueError, match="no task of the scenes is called 'word'"):
        ScenesTask(tasks=("word",), data=folder).check()


def test_each_world_has_its_own_model(subject):
    with pytest.raises(NotApplicable, match="trained on that world"):
        ScenesTask(per_task=1).measure(subject, seed=0)


def test_lens_and_transplant_run(subject, folder):
    lens = SceneLensTask(scenes=8, data=folder).measure(subject, seed=0)
    assert 0 <= lens.figures["kind in top 5"].value <= 1
    moved = SceneTransplantTask(per_kind=1, data=folder).measure(subject, seed=0)
    assert moved.details["pairs"] == 3
    assert "answer follows the patch, digit" in moved.figures


def test_pairs_differ_in_one_digit_of_the_same_split(folder):
    world = scene_world(folder)
    for pair in drawn_pairs(world, "test", 3, 1):
        assert pair.donor.things != pair.scene.things
        changed = [
            i for i, two in enumerate(zip(pair.scene.things, pair.donor.things, strict=True)) if two[0] != two[1]
        ]
        (place,) = changed
        assert pair.donor.things[place].kind in DIGITS
        assert pair.donor.images[place] in world.gallery.of(pair.donor.things[place].kind, "test")
        one, two = world.paint([pair.scene])[0], world.paint([pair.donor])[0]
        rows, columns = np.nonzero((one != two).any(-1))
        # Nothing outside the patch moves: noise and offsets follow from the scene's own look.
        assert {(row // 16, column // 16) for row, column in zip(rows, columns, strict=True)} == {divmod(pair.cell, 10)}


def test_training_and_classes_use_the_folder(subject, folder, tmp_path):
    before = {name: weight.clone() for name, weight in subject.model.named_parameters()}
    trained = SceneTraining(steps=2, rows=2, turns=2, data=folder).train(subject, seed=0, folder=tmp_path)
    moved = [name for name, weight in trained.model.named_parameters() if not torch.equal(weight, before[name])]
    assert moved
    assert not any("vision_tower" in name for name in moved)
    method = TokenClass(classes=("alive",), data=folder, found_on=8)
    assert method.files() == scene_files(folder)
    profile = profile_of(trained, scene_world(folder), 8, "anchors")
    assert json.dumps(profile.as_dict())
