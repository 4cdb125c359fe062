"""Methods in sequence: each acts on what the one before made; settings, paths and shrinking reach the parts."""

import json
from pathlib import Path

import pytest
import torch

import sparing
from sparing import zoo
from sparing.evaluate.task import NotApplicable, Subject
from sparing.policies import DivPrune, ViCA
from sparing.study import Study, read_study
from sparing.study.methods import vica
from sparing.study.methods.known import known_methods
from sparing.study.methods.policy import UsePolicy
from sparing.study.methods.sequence import InSequence
from sparing.study.methods.vica import SelectedViCA
from sparing.study.shrinking import smaller

PARTS = (
    {"use": "vica_selected", "with": {"by": "cosine", "budget": 2, "per_task": 4}},
    {"use": "DivPrune", "with": {"keep": 0.3}},
)
STUDY = """
study: both
models: {scenes: {path: scenes-llava, dtype: float32}}
methods:
  dense: {use: dense}
  both:
    use: sequence
    with:
      methods:
        - {use: vica_selected, with: {by: first, budget: 2, per_task: 2}}
        - {use: DivPrune, with: {keep: 0.5}}
tasks: {answers: {use: scenes, with: {per_task: 1, tasks: [shape]}}}
"""


@pytest.fixture(autouse=True)
def no_measurements(monkeypatch):
    monkeypatch.setattr(vica, "_STORES", {})


def test_each_acts_on_what_the_one_before_made():
    subject = Subject(*sparing.load(zoo.path("scenes-llava"), dtype=torch.float32))
    said = []
    made = InSequence(PARTS).prepare(subject, seed=0, on_step=lambda *told: said.append(told))
    first, second = made.subject.policies
    assert isinstance(first, ViCA)
    assert isinstance(second, DivPrune)
    assert made.details["sequence"][0]["layers"] == first.layers
    assert said
    assert all(0 <= done <= 1 for done, _ in said)
    ids = torch.tensor([[1, *[4] * 100, 10, 11]])
    with made.subject.applied() as run, torch.no_grad():
        made.subject.model(input_ids=ids, pixel_values=torch.rand(1, 3, 80, 80))
    # 30 of 100 visual tokens are left, read in two layers and changed in none.
    read = torch.stack([run.ledger.read(layer)[0, 1:101] for layer in range(8)])
    assert read.sum(1).gt(0).nonzero().flatten().tolist() == list(first.layers)
    assert read.any(0).sum() == 30
    # The other way round it cannot be: layers are chosen on a stock model.
    with pytest.raises(NotApplicable, match="comes with policies"):
        InSequence(PARTS[::-1]).prepare(subject, seed=0)


def test_it_is_what_its_parts_are(tmp_path):
    assert known_methods()["sequence"] is InSequence
    plain = InSequence(PARTS)
    assert not plain.seeded
    assert not plain.changes_model
    drawn = {"use": "vica_selected", "with": {"by": "random", "budget": 1}}
    assert InSequence((drawn, PARTS[1])).seeded
    images = {"use": "vica_selected", "with": {"by": "cosine", "images": Path("pictures")}}
    placed = InSequence((images, PARTS[1])).placed(tmp_path)
    assert placed.parts[0].images == tmp_path / "pictures"
    small = smaller(plain, tmp_path)
    assert isinstance(small.parts[0], SelectedViCA)
    assert isinstance(small.parts[1], UsePolicy)
    assert small.parts[0].per_task == 2
    assert small.methods[0]["with"]["per_task"] == 2
    assert small.methods[1] == PARTS[1]


def test_a_study_takes_it(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(STUDY)
    study = Study(path, tmp_path / "out")
    study.run()
    cells = {cell.label: cell for cell in study.results()}
    (both,) = [cell for label, cell in cells.items() if "both" in label]
    assert both.result.status == "done", both.result.error
    assert both.result.details["method"]["sequence"][0]["layers"] == [0, 1]
    json.dumps(both.result.details)


@pytest.mark.parametrize(
    ("methods", "line"),
    [
        ("[{use: DivPrune}]", "at least two, got 1"),
        ("[{use: DivPrun}, {use: dense}]", "no method is called 'DivPrun'"),
        ("[{use: DivPrune, wiht: {keep: 0.5}}, {use: dense}]", "no setting of a part is called 'wiht'"),
        ("[{use: DivPrune, with: {kep: 0.5}}, {use: dense}]", "no argument of DivPrune is called 'kep'"),
        ("[{use: vica_selected, with: {by: luck}}, {use: dense}]", "vica_selected: by: "),
        ("[{with: {}}, {use: dense}]", "`use` is missing"),
        ("[{use: vica_selected, with: {per_task: 1}}, {use: dense}]", "per_task=1: expected at least 2"),
    ],
)
def test_what_cannot_be_is_told_with_its_line(tmp_path, methods, line):
    path = tmp_path / "s.yaml"
    start, end = STUDY.split("      methods:\n")[0], STUDY.split("\n")[-2]
    path.write_text(f"{start}      methods: {methods}\n{end}\n")
    with pytest.raises(ValueError, match=r"s\.yaml, line \d+: ") as caught:
        read_study(path)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
