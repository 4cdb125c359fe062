"""The zoo's vision-language model: its batches and stages, a resumed run, and what the shipped weights can do."""

import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import sparing
from sparing import zoo
from sparing.cli.zoo import zoo as commands
from sparing.policies import ViCA
from sparing.worlds import scenes
from sparing.zoo.figures import wilson
from sparing.zoo.scene_batches import IGNORED, SceneBatch, SceneBatches, make_batch, normalise, positions_and_mask
from sparing.zoo.scene_card import answers, blind_guesser, scores, spoken_shares
from sparing.zoo.scene_course import SceneCourse, task_shares
from sparing.zoo.scene_recipe import Stage
from sparing.zoo.train import train

NAME = "scenes-llava"


@pytest.fixture(scope="module")
def recipe():
    """The zoo's, shrunk, and a stage of the one goal that it does not have."""
    shrunk = zoo.recipe(NAME).shrunk()
    return replace(shrunk, stages=(*shrunk.stages, replace(shrunk.stages[-1], goal="reading")))


@pytest.fixture(scope="module")
def course(recipe):
    made = SceneCourse(recipe, 3)
    made.model.eval()
    return made


@pytest.fixture(scope="module")
def whole_run(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(recipe, folder, checkpoint_every=2, bar=False)
    return folder


@pytest.fixture(scope="module")
def shipped():
    # In fp32: the same weights, and several times faster where a CPU has no bf16 instructions.
    return sparing.load(zoo.path(NAME), dtype=torch.float32)


def stage_of(recipe, goal):
    return next(stage for stage in recipe.stages if stage.goal == goal)


def drawn_with_questions(number, questions, seed=0):
    rng = np.random.default_rng(seed)
    drawn = list(itertools.islice(scenes.stream("train", seed), number))
    return drawn, [scenes.questions(scene, rng, questions) for scene in drawn]


def answer_tokens(batch):
    return [int(n) for n in (batch.targets != IGNORED).sum(1)]


def test_killed_run_resumes_bit_for_bit_across_stages(recipe, whole_run, tmp_path, monkeypatch):
    get = SceneBatches.__getitem__

    def stumble(self, wanted):
        if wanted == 5:
            raise SystemError("killed")
        return get(self, wanted)

    with monkeypatch.context() as patch:
        patch.setattr(SceneBatches, "__getitem__", stumble)
        with pytest.raises(SystemError, match="killed"):
            train(recipe, tmp_path, checkpoint_every=3, bar=False)
    train(recipe, tmp_path, checkpoint_every=3, bar=False)
    weights, others = (load_file(folder / "final" / "model.safetensors") for folder in (tmp_path, whole_run))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_batches_that_workers_make_train_the_same(recipe, whole_run, tmp_path):
    train(recipe, tmp_path, workers=2, bar=False)
    weights, others = (load_file(folder / "final" / "model.safetensors") for folder in (tmp_path, whole_run))
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_every_stage_trains_its_part_and_nothing_else(recipe, course):
    parts = {"patches": {"vision_tower", "probe"}, "words": {"language_model", "lm_head"},
             "bridge": {"multi_modal_projector"},
             "tuning": {"multi_modal_projector", "language_model", "lm_head"},
             "reading": {"language_model", "lm_head"}}  # fmt: skip
    seen = set()
    for index in range(recipe.total_steps):
        stage, within = recipe.stage_of(index)
        if within or stage.goal in seen:
            continue
        seen.add(stage.goal)
        course.trained.zero_grad()
        course.loss(course.trained, course.batches[index]).backward()
        trained = {name for name, weight in course.trained.named_parameters() if weight.grad is not None}
        assert {part for part in ("vision_tower", "probe", "language_model", "lm_head", "multi_modal_projector")
                if any(part in name for name in trained)} == parts[stage.goal]  # fmt: skip
    course.trained.zero_grad()
    assert seen == set(parts)


def test_packed_questions_are_answered_as_if_asked_alone(course):
    drawn, asked = drawn_with_questions(2, 4)
    stage = stage_of(course.recipe, "tuning")
    batch = make_batch(drawn, asked, course.processor.tokenizer, stage, np.random.default_rng(0))
    packed, right = course.trained.answer_logits(batch)
    place = 0
    for scene, questions in zip(drawn, asked, strict=True):
        for question in questions:
            text = f"<image> {question.text} {question.answer}"
            inputs = course.processor(images=scenes.picture(scene), text=text, return_tensors="pt")
            number = len(question.answer.split()) + 1
            alone = course.model(**inputs).logits[0, -number:]
            assert torch.allclose(packed[place : place + number], alone, atol=2e-4), question
            assert right[place : place + number - 1].tolist() == inputs["input_ids"][0, 1 - number :].tolist()
            assert right[place + number - 1] == course.processor.tokenizer.eos_token_id
            place += number
    assert place == len(packed)


def test_turns_are_the_chat_template_and_see_each_other(course):
    drawn, asked = drawn_with_questions(1, 3)
    stage = stage_of(course.recipe, "tuning")
    batch = make_batch(drawn, asked, course.processor.tokenizer, stage, np.random.default_rng(0), turns=True)
    packed, _ = course.trained.answer_logits(batch)
    chat = []
    for number, question in enumerate(asked[0]):
        picture = [{"type": "image"}] if number == 0 else []
        chat.append({"role": "user", "content": [*picture, {"type": "text", "text": question.text}]})
        chat.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
    text = course.processor.apply_chat_template(chat)
    inputs = course.processor(images=scenes.picture(drawn[0]), text=text, return_tensors="pt", add_special_tokens=False)
    logits = course.model(**inputs).logits[0]
    where = 101 + (batch.targets[0] != IGNORED).nonzero().flatten()
    assert torch.equal(inputs["input_ids"][0, 101:], batch.input_ids[0])
    assert torch.allclose(packed, logits[where], atol=2e-4)


def test_a_scene_told_in_full_is_read_where_its_picture_would_stand(course):
    drawn, asked = drawn_with_questions(1, 1)
    everything = replace(stage_of(course.recipe, "words"), bare=(100, 100))
    batch = make_batch(drawn, asked, course.processor.tokenizer, everything, np.random.default_rng(0))
    assert batch.cells.tolist() == [list(range(100))]
    embed = course.model.get_input_embeddings()
    ids = course.processor.tokenizer.get_vocab()
    told = torch.stack([embed(torch.tensor([ids[w] for w in words])).sum(0) for words in drawn[0].patch_words()])
    given = torch.cat([embed(torch.tensor([ids["<bos>"]])), told, embed(batch.input_ids[0])])
    alone = course.model(inputs_embeds=given[None]).logits[0, -answer_tokens(batch)[0] - 1 : -1]
    packed, _ = course.trained.answer_logits(batch)
    assert torch.allclose(packed, alone, atol=2e-4)


def test_few_told_cells_keep_their_places_and_all_objects(course):
    drawn, asked = drawn_with_questions(6, 2)
    stage = replace(stage_of(course.recipe, "words"), bare=(1, 5))
    batch = make_batch(drawn, asked, course.processor.tokenizer, stage, np.random.default_rng(0))
    assert batch.pixel_values.numel() == 0
    for row, scene in enumerate(drawn):
        cells = [cell for cell in batch.cells[row].tolist() if cell >= 0]
        objects = {thing.row * 10 + thing.column for thing in scene.things}
        assert cells == sorted(set(cells))
        assert objects <= set(cells)
        assert 1 <= len(cells) - len(objects) <= 5
        words = course.processor.tokenizer.convert_ids_to_tokens(batch.cell_words[row, 0].tolist())
        assert tuple(words) == scene.patch_words()[cells[0]]


def test_positions_and_mask_by_hand():
    cells, segments = torch.tensor([[2, -1]]), torch.tensor([[1, 1, 2, 0]])
    positions, sees = positions_and_mask(cells, segments, number=4)
    assert positions.tolist() == [[0, 3, 1, 5, 6, 5, 5]]
    # Rows ask, columns are seen: <bos>, the cell, padding, two tokens of one question, another question, padding.
    assert sees[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 0, 0],
    ]
    positions, sees = positions_and_mask(cells, segments[:, :1], number=4, around=(2, 1))
    # <bos>, a mark, the cell, padding, a mark behind the picture, a question.
    assert positions.tolist() == [[0, 1, 4, 2, 6, 7]]
    assert sees[0, 0].int().tolist()[-1] == [1, 1, 1, 0, 1, 1]


def test_batches_depend_on_seed_and_index_alone(recipe, course):
    one, again = (SceneBatches(recipe, course.processor.tokenizer, 0) for _ in range(2))
    last = recipe.total_steps - 1
    assert torch.equal(one[last]["pixel_values"], again[last]["pixel_values"])
    assert torch.equal(one[last]["input_ids"], again[last]["input_ids"])
    other = SceneBatches(recipe, course.processor.tokenizer, 1)
    assert not torch.equal(one[last]["pixel_values"], other[last]["pixel_values"])
    with pytest.raises(IndexError):
        one[last + 1]


def test_turns_never_ask_again_even_where_questions_may_repeat(recipe, course):
    """A later turn would copy the answer from an earlier one."""
    counts = tuple(float(task == "count") for task in scenes.TASKS)
    stage = replace(stage_of(recipe, "tuning"), steps=1, rows=3, questions=8, weights=counts, distinct=False, turns=0.0)
    asked = {}
    for turns in (0.0, 1.0):
        own = replace(recipe, stages=(replace(stage, turns=turns),))
        batch = SceneBatch(**SceneBatches(own, course.processor.tokenizer, 0)[0])
        words = course.processor.tokenizer.batch_decode(batch.input_ids, skip_special_tokens=True)
        asked[turns] = [[part.split()[-1] for part in row.split(" ?")[:-1]] for row in words]
    assert any(len(set(row)) < len(row) for row in asked[0.0])
    assert all(len(set(row)) == len(row) for row in asked[1.0])
    assert [set(row) for row in asked[0.0]] == [set(row) for row in asked[1.0]]


def test_training_pictures_are_what_the_processor_makes_of_them(course):
    drawn, _ = drawn_with_questions(2, 1)
    made = course.processor.image_processor([scenes.picture(scene) for scene in drawn], return_tensors="pt")
    assert torch.allclose(made["pixel_values"], normalise(scenes.paint(drawn)), atol=1e-6)


def test_learning_rate_rises_stays_and_falls():
    stage = Stage(goal="words", steps=100, rows=1, questions=1, lr=2.0, warmup=10, cooldown=0.5, floor=0.1)
    assert [stage.lr_at(step) for step in (0, 9, 40, 50)] == pytest.approx([0.2, 2.0, 2.0, 2.0])
    assert stage.lr_at(75) == pytest.approx(2 * (0.1 + 0.9 * 0.5))
    assert stage.lr_at(99) == pytest.approx(2 * (0.1 + 0.9 * 0.02))


def test_scenes_grow_in_the_first_steps():
    stage = Stage(goal="words", steps=100, rows=1, questions=1, lr=1.0, growing=50)
    assert [stage.most_objects(step) for step in (0, 9, 10, 49, 50, 99)] == [1, 1, 2, 5, 6, 6]


def test_shares_count_whole_answers(course, monkeypatch):
    stage = stage_of(course.recipe, "words")
    tokenizer = course.processor.tokenizer
    drawn = [example.scene for example in scenes.examples("validation", 1, tasks=["point", "shape"])]
    asked = [[example.question] for example in scenes.examples("validation", 1, tasks=["point", "shape"])]
    batch = make_batch(drawn, asked, tokenizer, stage, np.random.default_rng(0))
    _, right = course.trained.answer_logits(batch)
    logits = torch.nn.functional.one_hot(right, len(tokenizer)).float()
    monkeypatch.setattr(course.trained, "answer_logits", lambda _: (logits, right))
    assert task_shares(course.trained, batch, ["point", "shape"]) == {"point": 1.0, "shape": 1.0}
    logits[1] = logits[1].roll(1)
    assert task_shares(course.trained, batch, ["point", "shape"]) == {"point": 0.0, "shape": 1.0}


def test_saved_model_loads_with_its_processor_and_its_grid(whole_run):
    model, processor = sparing.load(whole_run / "final")
    assert model.dtype == torch.bfloat16
    scene = next(scenes.stream("test", 0))
    inputs = processor(images=[scenes.picture(scene)] * 2, text=["<image> what word ?", "<image> how many red ?"],
                       return_tensors="pt", padding=True)  # fmt: skip
    tokens = sparing.TokenMap.from_inputs(model, inputs)
    for row, pad in ((0, 1), (1, 0)):
        (span,) = tokens.images[row]
        assert span.grid == (10, 10)
        # Patch (row, column) is token 10 * row + column of the span.
        assert torch.equal(span.patches().flatten(), 1 + pad + torch.arange(100))


def test_a_picture_patch_lands_on_its_own_visual_token(course):
    """Only the embedding of the changed patch changes: its place among the tokens is its place in the picture."""
    scene = next(scenes.stream("test", 0))
    pixels = normalise(scenes.paint([scene]))
    other = pixels.clone()
    other[:, :, 24:32, 56:64] = -pixels[:, :, 24:32, 56:64] + 0.3
    embed = course.model.model.vision_tower.embeddings
    changed = (embed(pixels) - embed(other)).abs().sum(-1)[0, 1:] > 1e-4
    assert changed.nonzero().flatten().tolist() == [3 * 10 + 7]


def test_command_trains_and_writes_a_card(tmp_path):
    done = CliRunner().invoke(commands, ["train", NAME, "--shrink", "--out", str(tmp_path), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / NAME / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["figures"]["scores"]["shape"]["total"] == 5
    card = (tmp_path / NAME / "final" / "README.md").read_text()
    assert f"{record['figures']['parameters']:,} parameters" in card
    assert "| bridge | 2 |" in card


def test_shipped_weights_are_small_and_as_the_recipe_says(shipped):
    model, processor = shipped
    folder, recipe = zoo.path(NAME), zoo.recipe(NAME)
    weights = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert (folder / "model.safetensors").stat().st_size <= 12 * 2**20
    assert sum((zoo.path(name) / "model.safetensors").stat().st_size for name in zoo.names()) <= 40 * 2**20
    assert model.num_parameters() <= 6_000_000
    config = json.loads((folder / "config.json").read_text())
    for part in ("vision_config", "text_config"):
        assert {key: config[part][key] for key in recipe.config[part]} == recipe.config[part]
    assert config["vision_feature_select_strategy"] == "default"
    assert config["text_config"].get("use_cache", True)
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    card = (folder / "README.md").read_text()
    assert f"{(folder / 'model.safetensors').stat().st_size:,} bytes" in card
    for stage in recipe.stages:
        assert f"| {stage.goal} | {stage.steps:,} | {stage.rows} |" in card


def stated_figures():
    """What the card says: task -> accuracy and blind share."""
    stated = {}
    for line in (zoo.path(NAME) / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in scenes.TASKS and len(cells) == 6:
            stated[cells[0]] = float(cells[1].rstrip("%")) / 100, float(cells[4].rstrip("%")) / 100
    return stated


def test_shipped_model_does_what_its_card_says(shipped):
    asked = scenes.examples("test", 24, seed=77)
    measured = scores(asked, answers(*shipped, asked))
    stated = stated_figures()
    assert list(stated) == list(measured) == list(scenes.TASKS)
    for task, score in measured.items():
        low, high = wilson(score.right, score.total, level=0.99903)
        assert low <= stated[task][0] <= high, task
    together = sum(score.right for score in measured.values()) / len(asked)
    assert together == pytest.approx(sum(share for share, _ in stated.values()) / len(stated), abs=0.1)
    blind = blind_guesser()
    guessed = scores(asked, [blind.answer(example.question) for example in asked])
    for task, score in guessed.items():
        low, high = wilson(score.right, score.total, level=0.99903)
        assert low <= stated[task][1] <= high, task


def test_shipped_model_looks_at_the_picture(shipped):
    """With another scene's picture it is right no more often than the blind are, and it is well above that with its own."""
    asked = scenes.examples("test", 30, seed=79, tasks=["shape", "colour", "background"])
    shuffled = [
        scenes.Example(other.scene, example.question)
        for example, other in zip(asked, asked[3:] + asked[:3], strict=True)
    ]
    own = scores(asked, answers(*shipped, asked))
    others = answers(*shipped, shuffled)
    wrong = sum(answer == example.question.answer for answer, example in zip(others, asked, strict=True)) / len(asked)
    assert wrong < 0.35
    assert sum(score.right for score in own.values()) / len(asked) > wrong + 0.3


def test_visual_tokens_speak_as_the_card_says(shipped):
    measured = spoken_shares(*shipped, 20, seed=5)
    card = (zoo.path(NAME) / "README.md").read_text()
    for part in ("row", "column", "colour", "kind"):
        (on_object, bare) = re.search(rf"\| {part} \| ([\d.]+)% \| ([\d.]+)% \|", card).groups()
        assert measured[f"object {part}"] == pytest.approx(float(on_object) / 100, abs=0.12)
        assert measured[f"bare {part}"] == pytest.approx(float(bare) / 100, abs=0.05)


def test_padding_does_not_change_an_answer(shipped):
    asked = scenes.examples("test", 1, seed=78)
    assert answers(*shipped, asked, batch=11) == answers(*shipped, asked, batch=1)


@pytest.mark.parametrize("side", ["dense", "gathered"])
def test_vica_runs_on_the_shipped_model(shipped, side):
    model, processor = shipped
    asked = scenes.examples("test", 1, seed=80, tasks=["shape", "relation"])
    inputs = processor(images=[scenes.picture(e.scene) for e in asked], padding=True, return_tensors="pt",
                       text=[f"<image> {e.question.text}" for e in asked])  # fmt: skip
    last = inputs["attention_mask"].bool()
    with torch.inference_mode():
        stock = model(**inputs).logits
        with sparing.apply(model, ViCA(layers=[0, 2, 5]), execute=side):
            read = model(**inputs).logits
            written = model.generate(**inputs, max_new_tokens=2)
        with sparing.apply(model, ViCA(layers=[0, 2, 5]), execute="dense"):
            meaning = model(**inputs).logits
            meant = model.generate(**inputs, max_new_tokens=2)
        text = processor.tokenizer(asked[0].question.text, return_tensors="pt")
        with sparing.apply(model, ViCA(layers=[0, 2, 5]), execute=side):
            idle = model(**text).logits
        assert torch.equal(idle, model(**text).logits)
    assert (read - meaning)[last].abs().max() <= 1e-5 * meaning[last].abs().max()
    assert torch.equal(written, meant)
    assert (read - stock)[:, -1].abs().max() > 1e-2
