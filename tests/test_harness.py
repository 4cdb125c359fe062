"""Tasks against stock lm-eval, against an oracle in plain transformers, and against batches, padding, bad data, hostile code."""

import copy
import gzip
import json
import math
import os
import re
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import models
import sparing
from policy_cases import CASES
from sparing import zoo
from sparing.evaluate import ChoiceTask, GenerationTask, HarnessTask, NotApplicable, PerplexityTask, Subject, statistics
from sparing.evaluate.tasks import known_tasks, task_class
from sparing.evaluate.tasks.code_execution import run_code
from sparing.evaluate.tasks.metering import Batches, Meter
from sparing.evaluate.tasks.verifiers import last_number, verifier
from sparing.evaluate.tasks.writing import write
from sparing.policies import FastV, SkipGPT, SkipModules
from sparing.tokens import Group
from sparing.worlds import arithmetic

with warnings.catch_warnings():
    # lm-eval's own imports warn about their dependencies.
    warnings.simplefilter("ignore")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from sparing.evaluate.tasks.harness_loading import quiet
    from sparing.evaluate.tasks.language_model import PlannedLM

DATA = Path(os.environ.get("SPARING_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
# What lm-eval and the packages below it warn about is theirs to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
WORDS = [f"w{i}" for i in range(93)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """`datasets` keeps what it read in a folder of the test's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer():
    """One token a word, as many as the tiny models have."""
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special)


@pytest.fixture(scope="module")
def solver():
    """The shipped model, which can really do some arithmetic, in float32."""
    model, tokenizer = sparing.load(zoo.path("arithmetic-llama"), dtype=torch.float32)
    return model, tokenizer


def asked(kind, arguments):
    return [Instance(kind, {}, a, 0, metadata=("task", i, 1)) for i, a in enumerate(arguments)]


def planned(subject, batch, **settings):
    run = subject.applied()
    run.__enter__()
    return run, PlannedLM(subject, Meter(run, subject.model), batch=batch, **settings)


# Against stock lm-eval --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 8])
def test_without_policies_it_is_stock_lm_eval(solver, batch):
    model, tokenizer = solver
    drawn = arithmetic.examples("test", 1, seed=0)
    pairs = [(e.prompt, " " + e.solution) for e in drawn] + [(e.prompt, " 7") for e in drawn]
    texts = [(e.text,) for e in drawn[:5]]
    # HFLM lets the generation config's own limit win over the task's; here it has none.
    limit, model.generation_config.max_new_tokens = model.generation_config.max_new_tokens, None
    prompts = [(e.prompt, {"until": ["\n"], "max_gen_toks": 20}) for e in drawn]
    try:
        with quiet():
            stock = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch)
            expected = stock.loglikelihood(asked("loglikelihood", pairs), disable_tqdm=True)
            rolling = stock.loglikelihood_rolling(asked("loglikelihood_rolling", texts), disable_tqdm=True)
            written = stock.generate_until(asked("generate_until", prompts), disable_tqdm=True)
            run, lm = planned(Subject(model, tokenizer), batch)
        try:
            found = lm.loglikelihood(asked("loglikelihood", pairs))
            assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
            # Not bit for bit: the output matrix is applied to the continuation alone, so its product is blocked otherwise.
            assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=2e-5)
            assert lm.loglikelihood_rolling(asked("loglikelihood_rolling", texts)) == pytest.approx(rolling, abs=2e-5)
            assert lm.generate_until(asked("generate_until", prompts)) == written
        finally:
            run.__exit__()
    finally:
        model.generation_config.max_new_tokens = limit
    assert sum(a.strip() == e.solution for a, e in zip(written, drawn, strict=True)) >= 4, "nothing was solved"


def test_scores_equal_an_oracle_in_plain_transformers(solver, tmp_path):
    model, tokenizer = solver
    drawn = arithmetic.examples("test", 6, seed=1, tasks=["add", "largest"])
    rows = []
    for i, e in enumerate(drawn):
        choices = [e.solution, str(int(e.solution) + 1), "3"]
        rows.append({"q": e.prompt, "options": choices[i % 3 :] + choices[: i % 3], "right": (3 - i % 3) % 3})
    data = tmp_path / "c.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ChoiceTask(data, context="q", choices="options", gold="right", batch=4)
    policy = SkipModules([2], [5])
    found = task.measure(Subject(model, tokenizer, (policy,)), seed=0)

    right = []
    with torch.no_grad(), sparing.apply(model, policy, execute="dense"):
        for row in rows:
            scores = []
            for choice in row["options"]:
                context = tokenizer(row["q"]).input_ids
                ids = tokenizer(row["q"] + " " + choice).input_ids
                logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                scores.append(sum(float(logits[i - 1, ids[i]]) for i in range(len(context), len(ids))))
            right.append(float(max(range(3), key=scores.__getitem__) == row["right"]))
    assert list(found.items["acc"].values()) == right
    assert 0 < sum(right) < len(right), "every answer the same: the test says nothing"
    accuracy = statistics.share(int(sum(right)), len(right))
    assert (found.figures["acc"].low, found.figures["acc"].high) == (accuracy.low, accuracy.high)
    assert found.details["chance"] == pytest.approx(1 / 3)
    assert found.figures["flops_share"].value < 1
    assert found.main == "acc"


# Batches and padding ----------------------------------------------------------------------------------------------------

TEXT_CASES = [case for case in CASES if not case.pictures and case.regroup is None]


def requests():
    generator = torch.Generator().manual_seed(3)
    rows = []
    for n, m in ((3, 2), (17, 1), (9, 4), (17, 1), (12, 2), (5, 5), (8, 1), (14, 3)):
        ids = torch.randint(3, 90, (n + m,), generator=generator).tolist()
        rows.append(((f"{n}", f"{m}"), ids[:n], ids[n:]))
    # Two continuations of one context that differ in their only token share a pass.
    rows.append((("", ""), rows[1][1], [5]))
    return rows


@pytest.mark.parametrize("execute", ["gathered", "dense"])
@pytest.mark.parametrize("case", TEXT_CASES, ids=lambda case: case.name)
def test_scores_do_not_depend_on_the_batch(case, execute, tokenizer, monkeypatch):
    model = models.llama()
    subject = Subject(model, tokenizer, (case.make(model),), execute)
    with quiet():
        run, lm = planned(subject, 1)
        try:
            alone = lm._loglikelihood_tokens(requests())
            lm.batches = Batches(8, torch.device("cpu"))
            together = lm._loglikelihood_tokens(requests())
        finally:
            run.__exit__()
    assert [g for _, g in alone] == [g for _, g in together]
    assert [s for s, _ in alone] == pytest.approx([s for s, _ in together], abs=1e-4)


def test_without_the_mask_padding_changes_scores(tokenizer):
    """What the mask is for: a policy that looks at a row's last token would look at padding."""
    model = models.llama()
    subject = Subject(model, tokenizer, (FastV(1, 0.5, groups=[Group.TEXT]),))
    with quiet():
        run, lm = planned(subject, 1)
        try:
            alone = lm._loglikelihood_tokens(requests())
            lm.batches, lm.planned = Batches(8, torch.device("cpu")), False
            together = lm._loglikelihood_tokens(requests())
        finally:
            run.__exit__()
    assert max(abs(a - b) for (a, _), (b, _) in zip(alone, together, strict=True)) > 0.01


@pytest.mark.parametrize("execute", ["gathered", "dense"])
@pytest.mark.parametrize("name", ["skipgpt-linear", "mod-threshold", "fastv-text", "dllm-evict"])
def test_what_is_written_does_not_depend_on_the_batch(name, execute, tokenizer):
    model = models.llama()
    case = next(case for case in CASES if case.name == name)
    prompts = [
        (" ".join(WORDS[i : i + n]), {"until": ["w7"], "max_gen_toks": 8}) for i, n in ((1, 3), (20, 9), (50, 6))
    ]
    found = {}
    with quiet():
        for batch in (1, 3):
            run, lm = planned(Subject(model, tokenizer, (case.make(model),), execute), batch)
            try:
                found[batch] = lm.generate_until(asked("generate_until", prompts)), lm.written
            finally:
                run.__exit__()
    assert found[1][0] == found[3][0]
    lengths = {b: {key: [len(w.ids) for w in ws] for key, ws in written.items()} for b, (_, written) in found.items()}
    assert lengths[1] == lengths[3]


def test_memory_that_runs_out_halves_the_batch():
    tried = []

    def work(part):
        tried.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return [x * x for x in part]

    batches = Batches("auto", torch.device("cpu"))
    found = [y for _, out in batches.run(range(10), work) for y in out]
    assert found == [x * x for x in range(10)]
    assert tried == [8, 4, 2, 2, 2, 2, 2]
    with pytest.raises(torch.OutOfMemoryError):
        list(Batches(8, torch.device("cpu")).run(range(10), work))
    with pytest.raises(ZeroDivisionError):
        list(Batches("auto", torch.device("cpu")).run(range(10), lambda part: 1 // 0))
    for wrong in (0, -1, "big"):
        with pytest.raises(ValueError, match="batch"):
            Batches(wrong, torch.device("cpu"))


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


# Generation and verifiers -----------------------------------------------------------------------------------------------


@pytest.fixture
def problems(tmp_path):
    drawn = arithmetic.examples("test", 5, seed=0, tasks=["copy", "sort", "add"])
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps({"ask": {"text": e.prompt}, "answer": e.solution}) + "\n" for e in drawn))
    return file


def generation(problems, **settings):
    return GenerationTask(problems, question="ask.text", **{"stop": ("\n",), "max_new_tokens": 40, **settings})


@pytest.mark.parametrize("policies", [(), "skip", "skipgpt"])
def test_generation_counts_each_row_up_to_its_own_stop(problems, solver, policies):
    model, tokenizer = solver
    torch.manual_seed(0)
    made = {"skip": (SkipModules([], [1]),), "skipgpt": (SkipGPT.for_model(model),)}.get(policies, ())
    subject = Subject(model, tokenizer, made)
    found = generation(problems, batch=15).measure(subject, seed=0)
    # Row by row, in plain transformers.
    lengths, right = [], []
    with subject.applied():
        for row in map(json.loads, problems.read_text().splitlines()):
            ids = tokenizer(row["ask"]["text"], return_tensors="pt").input_ids
            out = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :].tolist()
            ends = (
                i
                for i in range(1, len(out) + 1)
                if "\n" in tokenizer.decode(out[:i]) or out[i - 1] == tokenizer.eos_token_id
            )
            n = next(ends, len(out))
            lengths.append(float(n))
            right.append(float(tokenizer.decode(out[:n], skip_special_tokens=True).strip() == row["answer"]))
    assert list(found.items["output_tokens"].values()) == lengths
    assert list(found.items["accuracy"].values()) == right
    assert found.figures["output_tokens"].value == pytest.approx(sum(lengths) / len(lengths))
    assert (found.figures["flops_share"].value < 1) == bool(made)
    if not made:
        assert found.figures["accuracy"].value > 0.5
        assert len(set(lengths)) > 1, "rows of one length: the test says nothing"


def test_sampling_is_seeded_and_paired(problems, solver):
    task = generation(problems, samples=3, temperature=4.0, limit=4)
    first, again = (task.measure(Subject(*solver), seed=1) for _ in range(2))
    assert first.items == again.items
    assert first.items != task.measure(Subject(*solver), seed=2).items
    assert set(first.items["accuracy"]) == {"0", "1", "2", "3"}
    assert first.figures["pass_at_k"].value >= first.figures["accuracy"].value
    assert first.figures["output_tokens"].n == 12


def test_thinking_is_no_answer_and_stops_nothing(tokenizer):
    """Stop strings count only after the thinking, and an answer that never gets there is wrong."""
    model = models.llama()
    subject = Subject(model, tokenizer)
    ids = tokenizer("w5 w6 w7", return_tensors="pt")
    with subject.applied() as run:
        meter = Meter(run, model)

        def words(**settings):
            torch.manual_seed(0)
            sampling = {"do_sample": True, "temperature": 3.0, "top_k": 0, "max_new_tokens": 12, **settings}
            [row] = write(model, tokenizer, meter, ids.input_ids, ids.attention_mask, **sampling)
            return tokenizer.decode(list(row.ids)).split(), row.finished

        free, _ = words()
        early = free[1]
        late = next(word for word in free[2:] if free.index(word) > 1)
        assert words(stop=[early]) == (free[:2], True)
        where = free.index(late)
        thought, finished = words(stop=[early], after=late)
        assert thought[: where + 1] == free[: where + 1], "the stop string ended the thinking"
        assert finished == (early in free[where + 1 :])


def test_generation_refuses_bad_settings(problems, solver, tokenizer):
    for settings, message in (
        ({"samples": 2}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"template": "no field"}, "template"),
        ({"answer": "solution"}, "no field 'solution'"),
        ({"system": "be brief"}, "chat template"),
        ({"verifier": "code"}, "allow_code"),
        ({"limit": 0}, "limit"),
    ):
        with pytest.raises(ValueError, match=message):
            generation(problems, **settings).check()
    with pytest.raises(NotApplicable, match="do not fit"):
        generation(problems, max_new_tokens=100_000).measure(Subject(*solver), seed=0)
    with pytest.raises(NotApplicable, match="chat template"):
        generation(problems, chat=True).measure(Subject(models.llama(), tokenizer), seed=0)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("it is 1,234.5.", 1234.5),
        ("from 3 to -7", -7),
        ("6e3", 6000),
        ("12%", 12),
        ("−4", -4),
        ("none", None),
        ("so 5 apples", 5),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


def test_math_is_judged_as_mathematics_in_any_thread():
    verdicts = {}

    def judge():
        with verifier("math") as verify:
            verdicts["same"] = verify("so the answer is $\\frac{1}{2}$", "0.5")
            verdicts["boxed"] = verify("thus \\boxed{x^2+2x+1}", "$(x+1)^2$")
            verdicts["wrong"] = verify("the answer is $3$", "4")
            verdicts["nothing"] = verify("I do not know", "4")

    thread = threading.Thread(target=judge)
    thread.start()
    thread.join()
    assert {name: v.right for name, v in verdicts.items()} == {
        "same": True,
        "boxed": True,
        "wrong": False,
        "nothing": False,
    }
    assert not any(v.error for v in verdicts.values())


def test_a_math_worker_that_dies_is_started_again(monkeypatch):
    with verifier("math") as judge:
        assert judge("$2$", "2").right
        judge._process.kill()
        judge._process.wait()
        assert judge("$3$", "3").right


HOSTILE = {
    "while True: pass": "stopped before its end|no end after",
    "import time\ntime.sleep(60)": "no end after",
    "import os\nwhile True: os.fork()": "not allowed|Resource",
    "import subprocess\nsubprocess.run(['true'])": "not allowed",
    "x = bytearray(1 << 34)": "MemoryError",
    "open('{outside}', 'w').write('x')": "not allowed",
    "import os\nos.remove('{victim}')": "not allowed",
    "open('big', 'wb').write(b'x' * (1 << 26))": "too large",
    "import os\nassert os.environ.get('SPARING_SECRET'), 'no secret'": "no secret",
    "import os\nos._exit(0)": "stopped before its end",
    "import sys\nsys.exit(0)": "SystemExit",
    "import socket\nsocket.create_connection(('127.0.0.1', 9), 1)": "not allowed|refused|unreachable",
    "import ctypes\nctypes.CDLL(None)": "not allowed",
    "def (": "SyntaxError",
}


@pytest.mark.parametrize("program", HOSTILE, ids=lambda p: p.splitlines()[-1][:30])
def test_hostile_programs_do_no_harm(program, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_SECRET", "x")
    if "sleep" in program:
        monkeypatch.setattr("sparing.evaluate.tasks.code_execution._START_SECONDS", 0.5)
    victim = tmp_path / "victim"
    victim.write_text("whole")
    source = program.replace("{outside}", str(tmp_path / "outside")).replace("{victim}", str(victim))
    found = run_code(source, seconds=1)
    assert not found.passed
    assert re.search(HOSTILE[program], found.error), found.error
    assert victim.read_text() == "whole"
    assert not (tmp_path / "outside").exists()


def test_honest_programs_pass():
    assert run_code(
        "import math, collections\nopen('a', 'w').write('x')\nassert open('a').read() == 'x' and math.gcd(4, 6) == 2"
    ).passed
    with pytest.raises(ValueError, match="allow-code"), verifier("code"):
        pass
    with verifier("code", allow_code=True) as verify:
        text = "Sure:\n```python\ndef double(x):\n    return 2 * x\n```\nDone."
        assert verify(text, "assert double(4) == 8").right
        wrong = verify(text, "assert double(4) == 9")
        assert (wrong.right, wrong.error) == (False, "AssertionError: ")


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
