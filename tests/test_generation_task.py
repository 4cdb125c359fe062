"""Generation as a task: each row up to its own stop, sampling, thinking, and settings that are refused."""

import json

import pytest
import torch

import models
from sparing.evaluate import GenerationTask, NotApplicable, Subject
from sparing.evaluate.tasks.metering import Meter
from sparing.evaluate.tasks.writing import write
from sparing.policies import SkipGPT, SkipModules
from sparing.worlds import arithmetic


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
