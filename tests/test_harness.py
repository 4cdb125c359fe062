"""lm-eval's tasks, multiple choice and perplexity: local data, documents, intervals, bad input, and real data against an oracle."""

import gzip
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import models
import sparing
from evaluate_cases import LM_EVAL_MARKS, WORDS
from sparing.evaluate import ChoiceTask, HarnessTask, PerplexityTask, Subject
from sparing.evaluate.tasks import known_tasks, task_class
from sparing.worlds import arithmetic

DATA = Path(os.environ.get("SPARING_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
pytestmark = LM_EVAL_MARKS

# lm-eval's tasks --------------------------------------------------------------------------------------------------------

CHOICES = [{"q": f"w{i} w{i + 1}", "options": ["w3", f"w{i} w2", "w9"], "right": i % 3} for i in range(7)]
YAML = """task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: q
doc_to_choice: options
doc_to_target: right
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def written_task(folder, yaml=YAML, rows=CHOICES):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.yaml").write_text(yaml)
    return str(folder / "mine.yaml")


def test_a_local_yaml_by_file_and_by_name(tmp_path, tokenizer):
    subject = Subject(models.llama(), tokenizer)
    file = written_task(tmp_path)
    steps = []
    task = HarnessTask(file, limit=5, metric="acc_norm")
    assert {path.name for path in task.files()} == {"mine.yaml", "rows.jsonl"}
    found = task.measure(subject, seed=0, on_step=lambda done, word: steps.append(done))
    assert found.main == "acc_norm"
    assert found.figures["acc"].n == 5
    assert steps[-1] == 1.0
    named = HarnessTask("mine", include=tmp_path, limit=5, batch=2)
    assert {path.name for path in named.files()} == {"mine.yaml", "rows.jsonl"}
    again = named.measure(subject, seed=0)
    assert again.items["acc"] == found.items["acc"]
    # The same documents as the task without a YAML.
    rows = tmp_path / "rows.jsonl"
    direct = ChoiceTask(rows, context="q", choices="options", gold="right", limit=5).measure(subject, seed=0)
    assert list(direct.items["acc"].values()) == list(found.items["acc"].values())


def test_harness_generation_reports_length_and_speed(tmp_path, solver):
    drawn = arithmetic.examples("test", 4, seed=0, tasks=["copy", "sort"])
    yaml = """task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: q
doc_to_target: a
target_delimiter: ""
generation_kwargs: {until: ["\\n"], max_gen_toks: 30}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}]
"""
    rows = [{"q": e.prompt, "a": " " + e.solution} for e in drawn]
    found = HarnessTask(written_task(tmp_path, yaml, rows), batch=3).measure(Subject(*solver), seed=0)
    assert found.main == "exact_match"
    assert found.figures["exact_match"].value >= 0.5
    assert found.figures["truncated"].value == 0
    assert found.figures["output_tokens"].value < 30
    each = found.figures["seconds_per_solved"]
    total = found.figures["seconds"].value
    assert each.value == pytest.approx(total / (found.figures["exact_match"].value * 8))
    assert found.details["cost"]["flops"]["decode"]["mlp"] > 0
    short = HarnessTask(str(tmp_path / "mine.yaml"), max_new_tokens=2).measure(Subject(*solver), seed=0)
    assert short.figures["truncated"].value == 1
    assert short.figures["output_tokens"].value == 2
    assert short.figures["seconds_per_solved"].value == math.inf
    assert short.details["seconds_per_solved"] == "none solved"


def test_rolling_tasks_have_intervals(tmp_path, tokenizer):
    yaml = """task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
    rows = [{"text": " ".join(WORDS[i : i + 12])} for i in range(6)]
    found = HarnessTask(written_task(tmp_path, yaml, rows)).measure(Subject(models.llama(), tokenizer), seed=0)
    perplexity = found.figures["word_perplexity"]
    assert perplexity.low < perplexity.value < perplexity.high
    assert perplexity.better == "lower"
    assert "word_perplexity" not in found.items, "no mean of its documents"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": []}, "cannot be loaded"),
        ({"rows": [CHOICES[0], {**CHOICES[1], "right": 7}]}, "document 1 has no gold answer.*7"),
        ({"yaml": YAML.replace("doc_to_target: right", "doc_to_target: wrong")}, "no gold answer|cannot be loaded"),
        ({"yaml": YAML.replace("task: mine", "note: mine")}, "no `task:`"),
        ({"yaml": "task: ["}, "cannot be loaded"),
        ({"yaml": YAML.replace("dataset_path: json", "dataset_path: nobody/nothing")}, "run it once with a network"),
    ],
)
def test_bad_tasks_are_refused_in_one_line(tmp_path, tokenizer, change, message):
    file = written_task(tmp_path, **change)
    with pytest.raises(ValueError, match=message) as caught:
        HarnessTask(file).measure(Subject(models.llama(), tokenizer), seed=0)
    assert "\n" not in str(caught.value)


def test_unknown_tasks_and_settings(tmp_path, monkeypatch):
    index = SimpleNamespace(task_index={"hellaswag": None, "winogrande": None})
    monkeypatch.setattr("sparing.evaluate.tasks.harness_loading._manager", lambda *a, **k: index)
    with pytest.raises(ValueError, match="did you mean hellaswag"):
        HarnessTask("helaswag").check()
    HarnessTask("hellaswag").check()
    with pytest.raises(ValueError, match=r"does not exist: name a YAML"):
        HarnessTask(str(tmp_path / "none.yaml")).check()
    for wrong in ({"limit": 0}, {"fewshot": -1}, {"batch": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            HarnessTask("hellaswag", **wrong).check()
    assert set(known_tasks()) >= {"harness", "choice", "perplexity", "generation"}
    with pytest.raises(ValueError, match="did you mean perplexity"):
        task_class("perplexty")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"context": "w1", "choices": ["w2", "w3"], "gold": None}, "no gold answer"),
        ({"context": "w1", "choices": ["w2", "w3"], "gold": "C"}, "no gold answer"),
        ({"context": "w1", "choices": ["w2"], "gold": 0}, "at least two choices"),
        ({"context": "w1", "choices": ["w2", "w3"]}, "no field 'gold'; it has context, choices"),
    ],
)
def test_choice_rows_are_looked_at(tmp_path, row, message):
    data = tmp_path / "c.jsonl"
    good = {"context": "w1", "choices": ["w2", "w3"], "gold": "B"}
    data.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="row 2.*" + message):
        ChoiceTask(data).check()


# Perplexity -------------------------------------------------------------------------------------------------------------


def test_perplexity_is_the_loss_of_the_text(tmp_path, tokenizer):
    model = models.llama()
    generator = torch.Generator().manual_seed(0)
    text = " ".join(WORDS[i] for i in torch.randint(0, 85, (400,), generator=generator).tolist())
    file = tmp_path / "t.txt"
    file.write_text(text)
    found = PerplexityTask(file, window=50).measure(Subject(model, tokenizer), seed=0)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    losses = []
    for start in range(0, len(ids) - 1, 49):
        row = torch.tensor([ids[start : start + 50]])
        if row.shape[1] == 50:
            with torch.no_grad():
                losses.append(float(model(row, labels=row).loss))
    assert found.figures["loss"].value == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert list(found.items["loss"].values()) == pytest.approx(losses, abs=1e-4)
    assert found.figures["perplexity"].value == pytest.approx(math.exp(found.figures["loss"].value))
    size = len(text.encode()) / len(ids)
    assert found.figures["bits_per_byte"].value == pytest.approx(
        found.figures["loss"].value / math.log(2) / size, rel=0.03
    )


# Real data --------------------------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.skipif(not (DATA / "zeroshot").is_dir(), reason="needs the shared data folder")
@pytest.mark.parametrize(
    ("name", "context", "gold"), [("hellaswag_validation_1000", "query", "gold"), ("arc_easy_test", "query", "gold")]
)
def test_real_multiple_choice_against_an_oracle(name, context, gold):
    model, tokenizer = sparing.load(DATA / "stories" / "stories260K-hf")
    data = DATA / "zeroshot" / f"{name}.jsonl.gz"
    found = ChoiceTask(data, context=context, gold=gold, limit=12).measure(Subject(model, tokenizer), seed=0)
    with gzip.open(data, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(12), strict=False)]
    acc, norm = [], []
    for row in rows:
        scores = []
        for choice in row["choices"]:
            context_ids = tokenizer(row["query"].rstrip()).input_ids
            ids = tokenizer(row["query"].rstrip() + " " + choice).input_ids
            logits = model(torch.tensor([ids[:-1]])).logits[0].detach().log_softmax(-1)
            scores.append(sum(float(logits[i - 1, ids[i]]) for i in range(len(context_ids), len(ids))))
        acc.append(float(max(range(len(scores)), key=scores.__getitem__) == row["gold"]))
        lengths = [len(choice) for choice in row["choices"]]
        norm.append(float(max(range(len(scores)), key=lambda i: scores[i] / lengths[i]) == row["gold"]))
    assert list(found.items["acc"].values()) == acc
    assert list(found.items["acc_norm"].values()) == norm
