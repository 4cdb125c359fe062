"""Training on scenes under policies: what is trained, on what, and that it goes on where it was killed."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

import sparing
from sparing import zoo
from sparing.evaluate.task import Subject
from sparing.policies import EnterLate
from sparing.study.trainings.scenes import SceneTraining, TwoSceneStages, _Turns, turns_of
from sparing.train.turns import IGNORED
from sparing.worlds import scenes

SMALL = SceneTraining(steps=4, rows=2, turns=2)


def subject(*policies):
    return Subject(*sparing.load(zoo.path("scenes-llava"), dtype=torch.float32), policies)


def test_labels_are_answers_and_their_ends():
    made = subject()
    drawn = list(itertools.islice(scenes.stream("train", 0), 2))
    asked = [scenes.questions(scene, np.random.default_rng(0), n) for scene, n in zip(drawn, (3, 1), strict=True)]
    batch = turns_of(made, scenes.WORLD, drawn, asked)
    for row, questions in enumerate(asked):
        kept = batch["labels"][row] != IGNORED
        said = made.tokenizer.decode(batch["input_ids"][row][kept])
        assert said.split() == " ".join(f"{q.answer} <eos>" for q in questions).split()
        assert torch.equal(batch["labels"][row][kept], batch["input_ids"][row][kept])
    # The same tokens as the chat template's.
    chat = []
    for number, question in enumerate(asked[0]):
        picture = [{"type": "image"}] if number == 0 else []
        chat.append({"role": "user", "content": [*picture, {"type": "text", "text": question.text}]})
        chat.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
    text = made.processor.apply_chat_template(chat)
    told = made.processor(images=scenes.picture(drawn[0]), text=text, return_tensors="pt", add_special_tokens=False)
    assert torch.equal(told["input_ids"][0], batch["input_ids"][0][batch["attention_mask"][0].bool()])


def test_only_the_parts_move_and_the_policies_act(tmp_path):
    made = subject(EnterLate(3))
    before = {name: weight.clone() for name, weight in made.model.named_parameters()}
    trained = SMALL.train(made, seed=0, folder=tmp_path)
    moved = {name for name, weight in trained.model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved
    assert not [name for name in moved if "vision_tower" in name]
    assert any("multi_modal_projector" in name for name in moved)
    assert any("lm_head" in name for name in moved)
    assert trained.policies == made.policies
    assert sparing.run_of(trained.model) is None, "the policies are taken off again"
    alone = dataclasses.replace(SMALL, parts=("bridge",)).train(subject(), seed=0, folder=tmp_path / "b")
    assert torch.equal(alone.model.lm_head.weight, before["lm_head.weight"])


def test_a_killed_training_goes_on(tmp_path, monkeypatch):
    whole = SMALL.train(subject(), seed=1, folder=tmp_path / "whole")
    get = _Turns.__getitem__

    def stumble(self, index):
        if index == 3:
            raise SystemError("killed")
        return get(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(_Turns, "__getitem__", stumble)
        with pytest.raises(SystemError):
            SMALL.train(subject(), seed=1, folder=tmp_path / "cut")
    again = SMALL.train(subject(), seed=1, folder=tmp_path / "cut")
    for one, two in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="at least 1"):
        SceneTraining(steps=0).check()
    with pytest.raises(ValueError, match="at least one of"):
        SceneTraining(parts=()).check()


def test_two_stages_begin_with_a_projector_that_knows_nothing(tmp_path, monkeypatch):
    stages = TwoSceneStages(aligning_steps=2, steps=3, rows=1, turns=2)
    moved, train = [], SceneTraining.train

    def watched(self, given, *, seed, folder, on_step=None):
        before = {name: weight.clone() for name, weight in given.model.named_parameters()}
        after = train(self, given, seed=seed, folder=folder, on_step=on_step)
        changed = (n for n, weight in after.model.named_parameters() if not torch.equal(weight, before[n]))
        moved.append((seed, self.steps, {name.split(".")[1] for name in changed if name.startswith("model.")}))
        return after

    monkeypatch.setattr(SceneTraining, "train", watched)
    told = []
    shipped = subject().model.model.multi_modal_projector.linear_1.weight.clone()
    trained = stages.train(
        subject(EnterLate(3)), seed=1, folder=tmp_path / "a", on_step=lambda *said: told.append(said)
    )
    projector = trained.model.model.multi_modal_projector.linear_1.weight
    assert (projector - shipped).abs().mean() > 0.5 * shipped.abs().mean()
    assert moved == [(2, 2, {"multi_modal_projector"}), (3, 3, {"multi_modal_projector", "language_model"})]
    assert told[-1][0] == 1
    assert told[-1][1].startswith("tuning:")
    # Killed between the stages, or in the second: the first is not trained again.
    again = stages.train(subject(EnterLate(3)), seed=1, folder=tmp_path / "a")
    for one, two in zip(trained.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(ValueError, match="at least 1"):
        TwoSceneStages(aligning_steps=0).check()
