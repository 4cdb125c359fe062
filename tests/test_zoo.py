"""The zoo: training a shrunk recipe, resuming it, and what the shipped model can do."""

import json
import os
import re
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from sparing import zoo
from sparing.cli.zoo import zoo as commands
from sparing.worlds import arithmetic
from sparing.zoo.figures import wilson
from sparing.zoo.text_card import answer_loss, answers, scores
from sparing.zoo.text_course import Batches, build_model, build_tokenizer, weighted_loss
from sparing.zoo.train import train

NAME = "arithmetic-llama"


@pytest.fixture(scope="module")
def recipe():
    return zoo.recipe(NAME).shrunk()


@pytest.fixture(scope="module")
def whole_run(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(recipe, folder, checkpoint_every=2, bar=False)
    return folder


@pytest.fixture(scope="module")
def shipped():
    folder = zoo.path(NAME)
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def losses(folder):
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in entries if "loss" in entry]


def fall_at_batch(monkeypatch, index, fall):
    get = Batches.__getitem__

    def stumble(self, wanted):
        if wanted == index:
            fall()
        return get(self, wanted)

    monkeypatch.setattr(Batches, "__getitem__", stumble)


def same_result(folder, other):
    assert losses(folder) == losses(other)
    weights, others = (load_file(place / "final" / "model.safetensors") for place in (folder, other))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_killed_run_resumes_bit_for_bit(recipe, whole_run, tmp_path, monkeypatch):
    def crash():
        raise SystemError("killed")

    with monkeypatch.context() as patch:
        fall_at_batch(patch, 5, crash)
        with pytest.raises(SystemError, match="killed"):
            train(recipe, tmp_path, checkpoint_every=2, bar=False)
    # A kill can cut a checkpoint off while it is being written.
    (tmp_path / "checkpoint-6").mkdir()
    train(recipe, tmp_path, checkpoint_every=2, bar=False)
    same_result(tmp_path, whole_run)


def test_interrupted_run_keeps_its_last_step(recipe, whole_run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fall_at_batch(patch, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt, match="step 5 of 8"):
            train(recipe, tmp_path, checkpoint_every=100, bar=False)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]
    train(recipe, tmp_path, checkpoint_every=100, bar=False)
    same_result(tmp_path, whole_run)


def test_finished_run_is_not_run_again(recipe, whole_run):
    steps, weights = losses(whole_run), load_file(whole_run / "final" / "model.safetensors")
    train(recipe, whole_run, checkpoint_every=2, bar=False)
    again = load_file(whole_run / "final" / "model.safetensors")
    assert losses(whole_run) == steps
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_another_run_is_not_resumed_but_may_be_replaced(recipe, whole_run, tmp_path):
    train(recipe, tmp_path, seed=1, bar=False)
    assert losses(tmp_path) != losses(whole_run)
    with pytest.raises(ValueError, match="another run.*--fresh"):
        train(recipe, tmp_path, seed=2, bar=False)
    train(recipe, tmp_path, fresh=True, checkpoint_every=2, bar=False)
    same_result(tmp_path, whole_run)


def test_loss_falls(whole_run):
    steps = losses(whole_run)
    assert steps[-1][1] < steps[0][1] - 0.5


def test_batches_depend_on_seed_and_index_alone(recipe):
    tokenizer = build_tokenizer(recipe)
    one, again = Batches(recipe, tokenizer, 0), Batches(recipe, tokenizer, 0)
    assert torch.equal(one[3]["input_ids"], again[3]["input_ids"])
    assert not torch.equal(one[3]["input_ids"], one[2]["input_ids"])
    assert not torch.equal(one[3]["input_ids"], Batches(recipe, tokenizer, 1)[3]["input_ids"])
    assert one[0]["input_ids"].shape == (4, 64)
    assert one[7]["input_ids"].shape == (2, 128)
    with pytest.raises(IndexError):
        one[8]


def test_weights_follow_questions_and_answers(recipe):
    tokenizer = build_tokenizer(recipe)
    batch = Batches(recipe, tokenizer, 0)[0]
    ids, weights = batch["input_ids"][0], batch["weights"][0]
    assert ids[0] == tokenizer.bos_token_id
    assert weights[0] == 0
    prompt = tokenizer.decode(ids[: int((weights == 1).nonzero()[0])], skip_special_tokens=True)
    assert re.fullmatch(r"Q: [^\n]+\nA:", prompt)
    assert weights.unique().tolist() == [0, pytest.approx(recipe.prompt_weight), 1]


def test_weighted_loss_is_the_mean_over_weighted_targets():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator)
    ids = torch.randint(7, (2, 5), generator=generator)
    weights = torch.rand(2, 5, generator=generator)
    total = sum(
        -weights[row, place + 1] * logits[row, place].log_softmax(-1)[ids[row, place + 1]]
        for row in range(2)
        for place in range(4)
    )
    assert torch.allclose(weighted_loss(logits, ids, weights), total / weights[:, 1:].sum())


def test_model_stays_under_four_million_parameters():
    recipe = zoo.recipe(NAME)
    assert build_model(recipe, build_tokenizer(recipe), 0).num_parameters() <= 4_000_000


@pytest.mark.parametrize(("right", "total", "low", "high"), [(0, 10, 0.0, 0.2775), (8, 10, 0.4902, 0.9433)])
def test_wilson(right, total, low, high):
    # Published values of the score interval without continuity correction.
    assert wilson(right, total) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_names_path_recipe():
    assert zoo.names() == (NAME, "scenes-llava")
    assert zoo.recipe(NAME).name == NAME
    with pytest.raises(ValueError, match=f"{NAME}.*got 'arithmetic-bert'"):
        zoo.path("arithmetic-bert")
    assert replace(zoo.recipe(NAME)).shrunk().config["num_hidden_layers"] == 2


def invoke(*words):
    return CliRunner().invoke(commands, [str(word) for word in words])


def test_command_trains_writes_a_card_and_a_record(tmp_path):
    done = invoke("train", NAME, "--shrink", "--out", tmp_path, "--device", "cpu", "--seed", 3)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / NAME / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["seed"] == 3
    assert record["figures"]["scores"]["copy"]["total"] == 5
    card = (tmp_path / NAME / "final" / "README.md").read_text()
    assert f"{record['figures']['parameters']:,} parameters" in card
    assert "8 steps of 256 tokens" in card


def test_command_for_an_unknown_model_names_the_known(tmp_path):
    failed = invoke("train", "nothing", "--out", tmp_path)
    assert NAME in str(failed.exception)
    assert list(tmp_path.iterdir()) == []


def test_commands_show_the_shipped_model():
    assert all(name in invoke("list").output for name in zoo.names())
    assert "Limits" in invoke("card", NAME).output


def test_shipped_model_is_a_stock_checkpoint_in_bf16(shipped):
    model, tokenizer = shipped
    assert model.dtype == torch.bfloat16
    assert {weight.dtype for weight in load_file(zoo.path(NAME) / "model.safetensors").values()} == {torch.bfloat16}
    assert model.num_parameters() <= 4_000_000
    assert (model.config.model_type, model.config.num_hidden_layers) == ("llama", 8)
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.use_cache
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)


def test_shipped_model_has_its_recipe_and_its_card():
    folder, recipe = zoo.path(NAME), zoo.recipe(NAME)
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in recipe.config} == dict(recipe.config)
    card = (folder / "README.md").read_text()
    assert f"{(folder / 'model.safetensors').stat().st_size:,} bytes" in card
    assert f"{recipe.steps:,} steps" in card


def test_shipped_model_does_what_its_card_says(shipped):
    asked = arithmetic.examples("test", 20, seed=77)
    measured = scores(asked, answers(*shipped, asked))
    stated = {}
    for line in (zoo.path(NAME) / "README.md").read_text().splitlines():
        if levels := re.findall(r"(\d+): (\d+)/(\d+)", line):
            stated[line.split()[1]] = {int(level): int(right) / int(total) for level, right, total in levels}
    assert list(stated) == list(measured)
    expected = {task: [] for task in measured}
    for made in asked:
        expected[made.task].append(stated[made.task][made.difficulty])
    for task, score in measured.items():
        low, high = wilson(score.right, score.total, level=0.99903)
        assert low <= sum(expected[task]) / score.total <= high, task
        assert score.interval[0] > score.chance, task
    together = sum(score.right for score in measured.values()) / len(asked)
    assert together == pytest.approx(sum(map(sum, expected.values())) / len(asked), abs=0.05)


def test_padding_does_not_change_an_answer(shipped):
    asked = arithmetic.examples("test", 2, seed=78)
    assert answers(*shipped, asked, batch=24) == answers(*shipped, asked, batch=1)


def test_page_is_held_out_and_familiar(shipped):
    page = zoo.page()
    problems = re.findall(r"Q: [^\n]+\nA: [^\n]+\n", page)
    assert "".join(problems) == page
    model, tokenizer = shipped
    assert 1500 <= len(tokenizer(page).input_ids) <= 3000
    drawn = {made.text for made in arithmetic.examples("test", len(problems) // len(arithmetic.TASKS), seed=2026)}
    assert drawn == set(problems)
    assert answer_loss(model, tokenizer, arithmetic.examples("test", 2, seed=2026)) < 0.5
