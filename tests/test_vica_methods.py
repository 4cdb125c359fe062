"""ViCA in studies: layers chosen or placed, budgets down to blind, and training on equal data for every arm."""

import pytest
import torch

import sparing
from models import llama
from picture_cases import folder
from processors import family
from sparing import zoo
from sparing.evaluate.task import NotApplicable, Subject
from sparing.policies import ViCA
from sparing.study import Study
from sparing.study.methods import vica
from sparing.study.methods.known import known_methods
from sparing.study.methods.vica import SelectedViCA
from sparing.study.trainings.scenes import SceneTraining

STUDY = """
study: reading
seeds: [0, 1]
models: {scenes: {path: scenes-llava, dtype: float32}}
methods:
  dense: {use: dense}
  vica: {use: vica_selected, with: {by: cosine, per_task: 2}, over: {budget: [2]}}
  blind: {use: vica_selected, with: {by: first, budget: 0, per_task: 2}}
  random: {use: vica_selected, with: {by: random, per_task: 2}, over: {budget: [2]}, control_of: vica}
training:
  tuned: {use: scenes, with: {steps: 2, rows: 1, turns: 2}}
tasks: {answers: {use: scenes, with: {per_task: 1, tasks: [shape]}}}
"""


@pytest.fixture(scope="module")
def shipped():
    return Subject(*sparing.load(zoo.path("scenes-llava"), dtype=torch.float32))


@pytest.fixture(autouse=True)
def no_measurements(monkeypatch):
    monkeypatch.setattr(vica, "_STORES", {})


def test_it_is_known_to_studies():
    assert known_methods()["vica_selected"] is SelectedViCA


def test_a_criterion_becomes_a_policy_with_its_scores(shipped):
    made = SelectedViCA(by="cosine", budget=2, prefix="freeze", per_task=2).prepare(shipped, seed=0)
    (policy,) = made.subject.policies
    assert isinstance(policy, ViCA)
    assert policy.layers == tuple(made.details["layers"])
    assert policy.prefix == "freeze"
    assert len(made.details["scores"]["cosine"]) == 8
    assert made.subject.execute == "gathered"
    assert not SelectedViCA(by="cosine").seeded


def test_a_larger_budget_goes_on_where_a_smaller_one_ended(tmp_path):
    subject = Subject(*family("llava"))
    images = folder(tmp_path / "pictures")
    small = SelectedViCA(budget=1, images=images).prepare(subject, seed=0)
    (store,) = vica._STORES.values()
    taken = store.taken
    large = SelectedViCA(budget=2, images=images).prepare(subject, seed=0)
    assert large.details["order"][:1] == small.details["order"]
    # The two layers that are left; nothing of the first round.
    assert store.taken == taken + 2
    assert len(SelectedViCA(images=images).files()) == 9


def test_placed_layers_and_the_blind_floor(shipped):
    places = {by: SelectedViCA(by=by, budget=2, per_task=2) for by in ("first", "last", "uniform", "random")}
    layers = {by: method.prepare(shipped, seed=4).subject.policies[0].layers for by, method in places.items()}
    assert (layers["first"], layers["last"], layers["uniform"]) == ((0, 1), (6, 7), (2, 6))
    assert places["random"].seeded
    assert len(layers["random"]) == 2
    other = {places["random"].prepare(shipped, seed=seed).subject.policies[0].layers for seed in range(4)}
    assert len(other) > 1
    blind = SelectedViCA(by="first", budget=0, per_task=2).prepare(shipped, seed=0).subject
    assert blind.policies[0].blind
    with blind.applied() as run, torch.no_grad():
        ids = torch.tensor([[1, *[4] * 100, 10, 11]])
        blind.model(input_ids=ids, pixel_values=torch.zeros(1, 3, 80, 80))
        assert not run.ledger.read(0)[0, 1:101].any()


def test_settings_and_models_are_checked(shipped, tmp_path):
    with pytest.raises(ValueError, match="neither a number of layers"):
        SelectedViCA(budget="all").check()
    with pytest.raises(ValueError, match="does not exist: name a folder"):
        SelectedViCA(images=tmp_path / "none").check()
    with pytest.raises(ValueError, match="expected at least 2"):
        SelectedViCA(per_task=1).check()
    with pytest.raises(NotApplicable, match="reads text alone"):
        SelectedViCA(budget=1).prepare(Subject(llama(), None), seed=0)
    with pytest.raises(NotApplicable, match="no word"):
        SelectedViCA(budget=1).prepare(Subject(*family("llava")), seed=0)
    with pytest.raises(NotApplicable, match="more than the model's 8"):
        SelectedViCA(by="first", budget=9, per_task=2).prepare(shipped, seed=0)
    under = Subject(shipped.model, shipped.processor, (ViCA([0]),))
    with pytest.raises(NotApplicable, match="comes with policies"):
        SelectedViCA(budget=1).prepare(under, seed=0)


def test_arms_are_trained_on_equal_data(tmp_path, monkeypatch):
    """Dense, chosen, blind and random arms of a seed see the same scenes in every step."""
    seen = {}
    train = SceneTraining.train

    def watched(self, subject, *, seed, folder, on_step=None):
        from sparing.study.trainings.scenes import _Turns

        batches = [_Turns(self, subject, seed)[i]["input_ids"].tolist() for i in range(self.steps)]
        seen.setdefault(seed, []).append(batches)
        return train(self, subject, seed=seed, folder=folder, on_step=on_step)

    monkeypatch.setattr(SceneTraining, "train", watched)
    path = tmp_path / "s.yaml"
    path.write_text(STUDY)
    study = Study(path, tmp_path / "out")
    study.run()
    results = {cell.label: cell.result for cell in study.results()}
    assert all(result.status == "done" for result in results.values()), {k: r.error for k, r in results.items()}
    assert set(seen) == {0, 1}
    assert {len(arms) for arms in seen.values()} == {4}
    assert all(arm == arms[0] for arms in seen.values() for arm in arms)
    assert seen[0][0] != seen[1][0]
