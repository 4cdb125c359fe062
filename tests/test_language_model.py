"""lm-eval's model around a run: against stock lm-eval, against an oracle in plain transformers, and in batches with padding."""

import copy
import json
import warnings

import pytest
import torch

import models
import sparing
from evaluate_cases import LM_EVAL_MARKS, TEXT_CASES, WORDS, asked, planned, requests
from policy_cases import CASES
from sparing.evaluate import ChoiceTask, Subject, statistics
from sparing.evaluate.tasks.metering import Batches
from sparing.policies import FastV, SkipModules
from sparing.tokens import Group
from sparing.worlds import arithmetic

with warnings.catch_warnings():
    # lm-eval's own imports warn about their dependencies.
    warnings.simplefilter("ignore")
    from lm_eval.models.huggingface import HFLM

    from sparing.evaluate.tasks.harness_loading import quiet

pytestmark = LM_EVAL_MARKS


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


@pytest.mark.parametrize("execute", ["gathered", "dense"])
@pytest.mark.parametrize("case", TEXT_CASES, ids=lambda case: case.name)
def test_scores_do_not_depend_on_the_batch(case, execute, tokenizer, monkeypatch):
    model = models.llama()
    subject = Subject(model, tokenizer, (case.make(model),), execute)
    with quiet():
        run, lm = planned(subject, 1, scoring="one_pass")
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
        run, lm = planned(subject, 1, scoring="one_pass")
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
