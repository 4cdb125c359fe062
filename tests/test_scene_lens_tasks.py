"""Lens tasks on scenes: what they mark agrees with the truth, nulls are low, and other models are told that they do not apply."""

import numpy as np
import pytest
import torch

import sparing
from models import llava, llava_batch
from processors import family
from sparing import zoo
from sparing.ablate import replace
from sparing.evaluate.task import NotApplicable, Subject
from sparing.evaluate.tasks.scene_lens import SceneLensTask
from sparing.evaluate.tasks.scene_transplant import SceneTransplantTask, drawn_pairs
from sparing.lens import embedding_lens, record
from sparing.tokens import Group, TokenMap
from sparing.worlds import scenes


@pytest.fixture(scope="module")
def shipped():
    return Subject(*sparing.load(zoo.path("scenes-llava"), dtype=torch.float32))


def test_the_lens_finds_what_is_there_and_the_nulls_do_not(shipped):
    before = {name: weight.clone() for name, weight in shipped.model.named_parameters()}
    found = SceneLensTask(scenes=12).measure(shipped, seed=0)
    value = {name: figure.value for name, figure in found.figures.items()}
    assert found.main == "colour in top 5"
    assert value["kind in top 5"] == value["kind in top 5, level 0"] > 0.5
    for null in ("random", "exchanged", "untrained projector"):
        assert value[f"kind in top 5 (null: {null})"] < value["kind in top 5"] / 2
    assert value["kind by probe"] > 0.5
    assert len(found.items["kind in top 5"]) == 12
    assert len([name for name in value if name.startswith("alignment (knn), level")]) in (0, 9)
    assert all(torch.equal(weight, before[name]) for name, weight in shipped.model.named_parameters())


def test_a_mark_by_hand(shipped):
    """One picture's mark, from cosines written out."""
    import itertools

    from sparing.anatomy import ask

    task = SceneLensTask(scenes=2, draw=4)
    found = task.measure(shipped, seed=0)
    scene = next(itertools.islice(scenes.stream("test", 4), 1))
    inputs = ask(shipped.model, shipped.processor, ["what word ?"], [[scenes.picture(scene)]])
    states = record(shipped.model, inputs, where=Group.IMAGE, levels=[0]).at(0)
    words = shipped.model.get_input_embeddings().weight
    right = []
    for thing in scene.things:
        state = states[10 * thing.row + thing.column]
        best = torch.cosine_similarity(state[None], words).topk(5).indices.tolist()
        right.append(shipped.tokenizer.get_vocab()[thing.kind] in best)
    assert found.items["kind in top 5"]["0"] == pytest.approx(np.mean(right))
    assert embedding_lens(shipped.model, inputs, k=5).ids.shape == (9, 100, 5)


def test_pairs_differ_in_one_patch_that_the_question_is_about():
    for pair in drawn_pairs(scenes.WORLD, "test", 4, 1):
        one, two = pair.scene.patch_words(), pair.donor.patch_words()
        assert [i for i in range(100) if one[i] != two[i]] == [pair.cell]
        assert one[pair.bare][3] == two[pair.bare][3] == "nothing"
        told = pair.question.text.split() + pair.question.answer.split()
        assert two[pair.cell][2] in told or two[pair.cell][3] in told
        assert not {two[pair.cell][2], two[pair.cell][3]} & {word for thing in pair.scene.things for word in thing[2:]}


def test_answers_follow_the_patch(shipped):
    found = SceneTransplantTask(per_kind=4).measure(shipped, seed=0)
    value = {name: figure.value for name, figure in found.figures.items()}
    assert value["answer follows the patch"] > value["with a bare patch"] + 0.4
    assert value["second picture itself"] > 0.7
    assert value["without the transplant"] < 0.5


@pytest.mark.parametrize("task", [SceneLensTask(scenes=2), SceneTransplantTask(per_kind=1)])
def test_strangers_are_not_looked_at(task):
    with pytest.raises(NotApplicable, match="trained on that world"):
        task.measure(Subject(*family("llava")), seed=0)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="at least 2"):
        SceneLensTask(scenes=1).check()
    with pytest.raises(ValueError, match="at least 1"):
        SceneTransplantTask(per_kind=0).check()


@pytest.mark.parametrize("layer", [0, 2])
def test_replace_by_states_is_what_another_prompt_held(layer):
    model, batch = llava(), llava_batch("left")
    other = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    tokens = TokenMap.from_inputs(model, batch)
    seen = record(model, other, where=Group.IMAGE, levels=[layer])
    states = torch.zeros(*tokens.group.shape, 42)
    states[seen.index[:, 0], seen.index[:, 1]] = seen.at(layer)
    with sparing.apply(model, replace(Group.IMAGE, by=states, layer=layer), execute="dense"):
        now = record(model, batch, where=Group.IMAGE, levels=[layer, 3])
        logits = model(**batch).logits
    with torch.no_grad():
        expected = model(**other).logits
    if layer == 0:
        assert torch.allclose(logits[tokens.valid], expected[tokens.valid], atol=1e-4)
    else:
        assert not torch.allclose(now.at(3), record(model, batch, where=Group.IMAGE, levels=[3]).at(3), atol=1e-3)
    with (
        sparing.apply(model, replace(Group.IMAGE, by=states[:, 1:]), execute="dense"),
        pytest.raises(ValueError, match="one state a token"),
    ):
        model(**batch)
