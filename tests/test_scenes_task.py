"""Questions about scenes as a task of studies: marks agree with the truth, and the model must know the world's words."""

import pytest
import torch

import sparing
from models import llava
from processors import family
from sparing import zoo
from sparing.evaluate.task import NotApplicable, Subject
from sparing.evaluate.tasks.registry import task_class
from sparing.evaluate.tasks.scenes import ScenesTask
from sparing.policies import DropTokens
from sparing.tokens import Group
from sparing.worlds import scenes
from sparing.zoo.scene_card import answers


@pytest.fixture(scope="module")
def shipped():
    return sparing.load(zoo.path("scenes-llava"), dtype=torch.float32)


def test_marks_are_those_of_the_card(shipped):
    task = ScenesTask(per_task=3, draw=5)
    found = task.measure(Subject(*shipped), seed=0)
    asked = scenes.examples("test", 3, seed=5)
    said = answers(*shipped, asked)
    right = [float(a == e.question.answer) for a, e in zip(said, asked, strict=True)]
    assert list(found.items["accuracy"].values()) == right
    assert found.main == "accuracy"
    assert found.figures["accuracy"].value == pytest.approx(sum(right) / len(right))
    assert set(scenes.TASKS) <= found.figures.keys()
    for name in scenes.TASKS:
        mine = [r for r, e in zip(right, asked, strict=True) if e.question.task == name]
        assert list(found.items[name].values()) == mine
    assert found.details["chance"]["relation"] == 0.25


def test_policies_act_and_are_paired_by_question(shipped):
    task = ScenesTask(tasks=("shape", "blind"), per_task=6)
    stock = task.measure(Subject(*shipped), seed=0)
    unseeing = task.measure(Subject(*shipped, (DropTokens(groups=[Group.IMAGE]),)), seed=0)
    assert stock.items["shape"].keys() == unseeing.items["shape"].keys()
    assert unseeing.figures["shape"].value < stock.figures["shape"].value
    assert unseeing.figures["blind"].value == stock.figures["blind"].value == 1
    assert unseeing.figures["flops_share"].value < 0.5


def test_strangers_are_not_asked():
    with pytest.raises(NotApplicable, match="trained on that world"):
        ScenesTask(per_task=1).measure(Subject(*family("llava")), seed=0)
    with pytest.raises(ValueError, match="no tokenizer"):
        ScenesTask(per_task=1).measure(Subject(llava(), None), seed=0)


def test_settings_are_checked():
    assert task_class("scenes") is ScenesTask
    with pytest.raises(ValueError, match="shape"):
        ScenesTask(tasks=("shap",)).check()
    with pytest.raises(ValueError, match="at least 1"):
        ScenesTask(per_task=0).check()
