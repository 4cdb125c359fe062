"""Scoring after the context: the same as in one pass where policies are causal, and as when the model writes where they are not."""

import dataclasses
import functools
import json

import pytest
import torch

import models
import sparing
import vision_models
from evaluate_cases import LM_EVAL_MARKS, TEXT_CASES, WORDS, planned, requests
from sparing.evaluate import ChoiceTask, HarnessTask, Subject
from sparing.evaluate.tasks.harness_loading import quiet
from sparing.evaluate.tasks.metering import Batches, Meter
from sparing.evaluate.tasks.two_pass import score_in_two_passes
from sparing.policies import FastV, MoD, SkipModules
from sparing.tokens import Group

pytestmark = LM_EVAL_MARKS
CAUSAL = [case for case in TEXT_CASES if case.make(models.llama()).causal]
OTHERS = [case for case in TEXT_CASES if case not in CAUSAL]


def scores(subject, batch, scoring, given=None):
    with quiet():
        run, lm = planned(subject, batch, scoring=scoring)
        try:
            return lm._loglikelihood_tokens(given or requests()), lm
        finally:
            run.__exit__()


def same(one, two, tolerance=1e-4):
    assert [greedy for _, greedy in one] == [greedy for _, greedy in two]
    assert [score for score, _ in one] == pytest.approx([score for score, _ in two], abs=tolerance)


def test_the_cases_are_of_both_kinds():
    assert len(CAUSAL) >= 4
    assert {case.name for case in OTHERS} >= {"fastv-text", "drop-keep", "mod-release", "mod-paper"}


@pytest.mark.parametrize("execute", ["gathered", "dense"])
@pytest.mark.parametrize("case", [None, *CAUSAL], ids=lambda case: case.name if case else "stock")
def test_it_equals_one_pass_where_policies_are_causal(case, execute, tokenizer):
    model = models.llama()
    subject = Subject(model, tokenizer, (case.make(model),) if case else (), execute)
    one, lm = scores(subject, 4, "one_pass")
    two, other = scores(subject, 4, "two_pass")
    same(one, two)
    assert (lm.scored, other.scored) == ({"one_pass"}, {"two_pass"})


FAMILIES = {name: functools.partial(models.text_family, name) for name in ("mistral", "gemma2", "qwen3")}
FAMILIES |= {"qwen2_5_vl": vision_models.qwen2_5_vl}


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_and_positions_of_other_families(family, tokenizer):
    model = FAMILIES[family]()
    for policies in ((), (SkipModules([1], [0]),)):
        subject = Subject(model, tokenizer, policies)
        same(scores(subject, 8, "one_pass")[0], scores(subject, 8, "two_pass")[0])


@pytest.mark.parametrize("execute", ["gathered", "dense"])
@pytest.mark.parametrize("case", TEXT_CASES, ids=lambda case: case.name)
def test_scores_do_not_depend_on_the_batch(case, execute, tokenizer):
    model = models.llama()
    subject = Subject(model, tokenizer, (case.make(model),), execute)
    same(scores(subject, 1, "two_pass")[0], scores(subject, 8, "two_pass")[0])


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_it_is_what_the_model_would_have_written_with(case, tokenizer):
    """An oracle: the context alone, then token by token, as `generate` goes."""
    model = models.llama()
    subject = Subject(model, tokenizer, (case.make(model),))
    found, _ = scores(subject, 8, "auto")
    expected = []
    with torch.no_grad(), subject.applied():
        for _, context, continuation in requests():
            out = model(torch.tensor([context]), use_cache=True)
            logits = [out.logits[0, -1]]
            for token in continuation[:-1]:
                out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
                logits.append(out.logits[0, -1])
            rows = torch.stack(logits).log_softmax(-1)
            wanted = torch.tensor(continuation)
            total = float(rows.gather(1, wanted[:, None]).sum())
            expected.append((total, bool((rows.argmax(-1) == wanted).all())))
    same(found, expected)
    one, lm = scores(subject, 8, "one_pass")
    assert lm.scored == {"one_pass"}
    assert max(abs(a - b) for (a, _), (b, _) in zip(found, one, strict=True)) > 1e-3, "the test says nothing"


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_probabilities_of_continuations_add_up(case, tokenizer):
    """P(a) = sum over b of P(a b): what comes later changes nothing before. In one pass MoD's top-k breaks it."""
    model = models.llama()
    subject = Subject(model, tokenizer, (case.make(model),))
    context = requests()[1][1]
    given = [(("", ""), context, end) for end in [[7], *([7, token] for token in range(97))]]
    for scoring in ("two_pass", "one_pass"):
        (first, _), *rest = scores(subject, 128, scoring, given)[0]
        total = torch.tensor([score for score, _ in rest], dtype=torch.float64).logsumexp(0)
        error = abs(float(total) - first)
        assert error < 1e-5 if scoring == "two_pass" else error > 0.05 or case.name != "mod-paper"


def test_auto_takes_two_passes_only_where_a_policy_is_not_causal(tokenizer):
    model = models.llama()
    torch.manual_seed(0)
    for policies, way in (
        ((), "one_pass"),
        ((SkipModules([1], []),), "one_pass"),
        ((MoD.for_model(model),), "two_pass"),
        ((SkipModules([1], []), FastV(1, 0.5, groups=[Group.TEXT])), "two_pass"),
    ):
        assert scores(Subject(model, tokenizer, policies), 4, "auto")[1].scored == {way}


# Costs ------------------------------------------------------------------------------------------------------------------


def test_a_context_is_read_once_and_counted_once(tokenizer):
    model = models.llama()
    contexts = [list(range(5, 16)), list(range(30, 37))]
    ends = [[7], [8, 9], [10, 11, 12], [13, 14, 15, 16]]
    given = [(("", ""), context, end) for context in contexts for end in ends]
    for policies, batch in (((), 8), ((SkipModules([1], [0]),), 1), ((SkipModules([1], [0]),), 3)):
        with sparing.apply(model, *policies) as run, torch.no_grad():
            expected = dict.fromkeys(("prefill", "decode"), 0)
            for context in contexts:
                model(torch.tensor([context]), logits_to_keep=1)
                expected["prefill"] += sum(run.ledger.cost().prefill.flops.values())
                for end in ends[1:]:
                    cache = model(torch.tensor([context]), use_cache=True).past_key_values
                    model(torch.tensor([end[:-1]]), past_key_values=cache, use_cache=True)
                    expected["decode"] += sum(run.ledger.cost().decode.flops.values())
        _, lm = scores(Subject(model, tokenizer, policies), batch, "two_pass", given)
        spent, dense = (
            {phase: sum(f.values()) for phase, f in each.items()} for each in (lm.meter.flops, lm.meter.dense_flops)
        )
        # Logits of padding are computed with a batch's others.
        padding = lm.meter.flops["decode"]["lm_head"] - 2 * (1 + 2 + 3) * 2 * run.shape.hidden * run.shape.vocabulary
        assert padding == 0 if batch == 1 else padding > 0
        assert spent == {"prefill": expected["prefill"], "decode": expected["decode"] + padding}
        assert all(spent[phase] < dense[phase] if policies else spent[phase] == dense[phase] for phase in spent)


def test_memory_that_runs_out_in_the_second_pass_is_tried_again_and_counted_once(tokenizer, monkeypatch):
    model = models.llama()
    given = [(("", ""), list(range(5, 16)), [i, i + 1]) for i in range(20, 26)]
    subject = Subject(model, tokenizer, (SkipModules([1], []),))
    expected, calm = scores(subject, 8, "two_pass", given)
    stock = model.forward
    failed = []

    def tight(*args, **kwargs):
        if kwargs["input_ids"].shape[0] > 2:
            failed.append(kwargs["input_ids"].shape[0])
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return stock(*args, **kwargs)

    with quiet(), subject.applied() as run:
        contexts = [((*range(5, 16),), [[i, i + 1] for i in range(20, 26)]), ((*range(40, 45),), [[3]])]
        monkeypatch.setattr(model, "forward", tight)
        meter = Meter(run, model)
        batches = Batches("auto", torch.device("cpu"))
        found = {}
        for part, answers in batches.run(
            contexts, lambda part: score_in_two_passes(model, meter, part, min(batches.size, 8))
        ):
            found |= {context: scored for (context, _), scored in zip(part, answers, strict=True)}
        monkeypatch.undo()
    assert failed == [6]
    same(found[contexts[0][0]], expected)
    assert meter.flops["decode"] == calm.meter.flops["decode"]


# A fork of a cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("execute", ["gathered", "dense"])
@pytest.mark.parametrize("case", TEXT_CASES, ids=lambda case: case.name)
def test_a_fork_leaves_its_cache_as_it_was(case, execute):
    model = models.llama()
    batch = models.text_batch("left")
    more = torch.tensor([[5, 6], [7, 8], [9, 10]])

    def go_on(cache, rows):
        mask = torch.cat([batch["attention_mask"][rows], torch.ones(len(rows), 2, dtype=torch.long)], dim=1)
        at = batch["attention_mask"][rows].sum(1, keepdim=True) + torch.arange(2)
        return model(
            input_ids=more[rows], attention_mask=mask, position_ids=at, past_key_values=cache, use_cache=True
        ).logits

    with torch.no_grad(), sparing.apply(model, case.make(model), execute=execute) as run:
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        cache = model(**batch, position_ids=positions, use_cache=True).past_key_values
        before, length = run.ledger.states(), cache.get_seq_length()
        rows = torch.tensor([2, 0, 0, 1, 2])
        forked = go_on(cache.fork(rows), rows)
        assert run.ledger.states().shape[2:] == (5, length + 2)
        assert run.ledger.cost().prefill.flops["mlp"] == 0, "the fork counts the prompt again"
        assert cache.get_seq_length() == length
        whole = go_on(cache, torch.arange(3))
        assert torch.equal(run.ledger.states()[..., :length], before)
        torch.testing.assert_close(forked, whole[rows], atol=1e-5, rtol=1e-4)


# The tasks --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def choices(tmp_path):
    rows = [
        {"context": f"w{i} w{i + 1} w{i + 2}", "choices": ["w3", f"w{i} w2", "w9 w8 w7"], "gold": i % 3}
        for i in range(7)
    ]
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_task_says_how_it_scored(choices, tokenizer):
    model = models.llama()
    stock, fast = Subject(model, tokenizer), Subject(model, tokenizer, (FastV(1, 0.5, groups=[Group.TEXT]),))
    task = ChoiceTask(choices)
    assert task.measure(stock, seed=0).details["scoring"] == "one_pass"
    found = task.measure(fast, seed=0)
    assert found.details["scoring"] == "two_pass"
    explicit = dataclasses.replace(task, scoring="two_pass", batch=2)
    assert explicit.measure(fast, seed=0).items == found.items
    assert explicit.measure(stock, seed=0).items == task.measure(stock, seed=0).items
    with pytest.raises(ValueError, match="scoring='both': choose one of auto"):
        dataclasses.replace(task, scoring="both").check()


def test_long_texts_have_no_context_and_are_scored_in_one_pass(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(WORDS[i : i + 12])}) + "\n" for i in range(3))
    )
    (tmp_path / "mine.yaml").write_text(
        """task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}]
"""
    )
    subject = Subject(models.llama(), tokenizer, (FastV(1, 0.5, groups=[Group.TEXT]),))
    found = HarnessTask(str(tmp_path / "mine.yaml"), scoring="two_pass").measure(subject, seed=0)
    assert found.details["scoring"] == "one_pass"


def test_what_is_too_long_loses_its_beginning_in_both_ways(tokenizer):
    subject = Subject(models.llama(), tokenizer)
    given = [(("", ""), list(range(5, 45)), end) for end in ([7], [8, 9], [10, 11, 12, 13, 14, 15])]
    for scoring in ("one_pass", "two_pass"):
        with quiet():
            run, lm = planned(subject, 4, scoring=scoring, max_length=20)
            try:
                found = lm._loglikelihood_tokens(given)
            finally:
                run.__exit__()
        assert lm.shortened == 3
        if scoring == "one_pass":
            expected = found
    same(expected, found)
