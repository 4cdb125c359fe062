"""Tasks of lmms-eval: what the model is asked and answers, and the whole way through lmms-eval where an environment has it."""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image, ImageDraw
from tokenizers.processors import TemplateProcessing

import processors as cases
import sparing
from sparing.cli import main
from sparing.evaluate import SUITES, LmmsTask, NotApplicable, Subject, task_class
from sparing.evaluate.tasks.lmms_answers import generation_settings, turns_of_messages, turns_of_visuals
from sparing.evaluate.tasks.lmms_results import outcome_of
from sparing.evaluate.tasks.metering import Meter
from sparing.evaluate.tasks.picture_answers import PictureAnswers
from sparing.policies import FastV, SkipModules, ViCA

COLOURS = ("red", "blue", "green", "black")
QUESTIONS = ("Which colour is it?", "What is here, and which of the two is larger?", "Why?")
VICA = (ViCA([0]),)
POLICIES = (SkipModules(attention=[1]), FastV(1, 0.5))


def square(colour):
    """A square of a colour, as large as the tiny models' pictures."""
    picture = Image.new("RGB", (30, 30), "white")
    ImageDraw.Draw(picture).rectangle((6, 6, 22, 22), fill=colour)
    return picture


def conversations():
    """One picture, two, none, one: with texts of different lengths."""
    pictures = [[square("red")], [square("blue"), square("green")], [], [square("black")]]
    return [turns_of_visuals(shown, QUESTIONS[i % 3]) for i, shown in enumerate(pictures)]


def prompt(processor, turns):
    """A conversation as transformers itself would encode it, alone."""
    text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    pictures = [content["image"] for content in turns[0]["content"] if content["type"] == "image"]
    return processor(text=[text], return_tensors="pt", **({"images": [pictures]} if pictures else {}))


def alone(subject, turns, new=6):
    """What a plain `generate` writes after one conversation."""
    inputs = prompt(subject.processor, turns)
    with subject.applied(), torch.inference_mode():
        out = subject.model.generate(**inputs, max_new_tokens=new, do_sample=False, pad_token_id=0)
    return subject.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def answering(subject, run, batch=3, **settings):
    return PictureAnswers(subject, Meter(run, subject.model), batch=batch, **settings)


# The adapter ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("policies", [(), POLICIES], ids=["stock", "policies"])
def test_answers_of_a_batch_are_those_of_each_row_alone(name, policies):
    cases.inputs(name)  # skips what its processor cannot do with older libraries
    subject = Subject(*cases.family(name), policies)
    asked = conversations()
    wanted = [alone(subject, turns) for turns in asked]
    assert len(set(wanted)) > 1
    with subject.applied() as run:
        answers = answering(subject, run)
        found = answers.write([lambda turns=turns: turns for turns in asked], max_new_tokens=6)
    assert [text for text, _ in found] == wanted
    assert answers.meter.rows == len(asked)
    assert all(len(written.ids) <= 6 and written.seconds > 0 for _, written in found)


def test_stop_strings_and_the_callers_own_tokenizer():
    model, processor = cases.family("llava")
    processor.tokenizer.padding_side = "right"
    subject = Subject(model, processor)
    (turns, *_) = conversations()
    whole = alone(subject, turns)
    stop = next(c for c in whole[1:] if c.isascii() and c != whole[0])
    with subject.applied() as run:
        ((text, written),) = answering(subject, run).write([lambda: turns], max_new_tokens=6, stop=(stop,))
    assert text == whole.partition(stop)[0]
    assert written.finished
    assert processor.tokenizer.padding_side == "right"


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("two_pass", [False, True], ids=["one pass", "two passes"])
def test_scores_of_a_batch_are_those_of_a_plain_forward(name, two_pass):
    subject = Subject(*cases.family(name), (SkipModules(attention=[1]),))
    ends = [" red", " a blue circle", " no", " black, I think"]
    asked = conversations()
    wanted = []
    for turns, end in zip(asked, ends, strict=True):
        inputs = prompt(subject.processor, turns)
        more = torch.tensor([subject.tokenizer(end, add_special_tokens=False).input_ids])
        for key in [k for k, v in inputs.items() if v.shape == inputs["attention_mask"].shape and k != "input_ids"]:
            fill = torch.ones_like(more) if key == "attention_mask" else torch.zeros_like(more)
            inputs[key] = torch.cat([inputs[key], fill], dim=1)
        start = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], more], dim=1)
        with subject.applied(), torch.inference_mode():
            scores = subject.model(**inputs).logits[0, start - 1 : -1].log_softmax(-1)
        wanted.append(scores.gather(1, more.T).sum().item())
    with subject.applied() as run:
        given = [(lambda turns=turns: turns, end) for turns, end in zip(asked, ends, strict=True)]
        found = answering(subject, run, two_pass=two_pass).score(given)
        with pytest.raises(ValueError, match="a continuation of at least one token"):
            answering(subject, run).score([(lambda: asked[0], "")])
    torch.testing.assert_close([total for total, _, _ in found], wanted, atol=2e-4, rtol=0)
    assert [n for _, _, n in found] == [len(subject.tokenizer(e, add_special_tokens=False).input_ids) for e in ends]
    assert not any(greedy for _, greedy, _ in found)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_policy_that_is_not_causal_never_sees_what_is_scored(name):
    """FastV chooses pictures' tokens by the conversation's last token, as when the model writes: an oracle token by token."""
    subject = Subject(*cases.family(name), (FastV(1, 0.5),))
    ends = [" red", " a blue circle", " no", " black, I think"]
    asked = conversations()
    wanted = []
    with subject.applied(), torch.inference_mode():
        for turns, end in zip(asked, ends, strict=True):
            inputs = prompt(subject.processor, turns)
            tokens = subject.tokenizer(end, add_special_tokens=False).input_ids
            if name == "qwen2_5_vl":
                # It remembers the positions of the last conversation with pictures.
                subject.model.model.rope_deltas = None
            out = subject.model(**inputs, use_cache=True)
            total = float(out.logits[0, -1].log_softmax(-1)[tokens[0]])
            for token, following in itertools.pairwise(tokens):
                out = subject.model(
                    input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True
                )
                total += float(out.logits[0, -1].log_softmax(-1)[following])
            wanted.append(total)
    given = [(lambda turns=turns: turns, end) for turns, end in zip(asked, ends, strict=True)]
    scored = {}
    for two_pass in (None, False):
        with subject.applied() as run:
            scored[two_pass] = [total for total, _, _ in answering(subject, run, two_pass=two_pass).score(given)]
    torch.testing.assert_close(scored[None], wanted, atol=2e-4, rtol=0)
    assert max(abs(a - b) for a, b in zip(scored[False], wanted, strict=True)) > 1e-3, "the test says nothing"


def test_requests_become_conversations():
    picture = square("red")
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "image", "url": picture.convert("P")}]}
    ]
    ((turn),) = turns_of_messages(messages)
    assert [content["type"] for content in turn["content"]] == ["text", "image"]
    assert turn["content"][1]["image"].mode == "RGB"
    assert turns_of_visuals(None, "Q")[0]["content"] == [{"type": "text", "text": "Q"}]
    for content in ({"type": "video", "url": "a.mp4"}, {"type": "audio", "url": "a.wav"}):
        with pytest.raises(NotApplicable, match="something other than pictures and texts"):
            turns_of_messages([{"role": "user", "content": [content]}])
    with pytest.raises(NotApplicable, match=r"cannot be read: none\.png"):
        turns_of_visuals(["none.png"], "Q")


def test_settings_of_generation():
    mme = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}
    assert generation_settings(mme) == {"max_new_tokens": 16, "stop": (), "sampling": {}}
    seed = generation_settings({"until": ["ASSISTANT:"], "image_aspect_ratio": "original"})
    assert seed == {"max_new_tokens": 1024, "stop": ("ASSISTANT:",), "sampling": {}}
    drawn = generation_settings({"temperature": 0.7, "top_p": 0.9, "until": "\n"}, 5)
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}
    assert drawn == {"max_new_tokens": 5, "stop": ("\n",), "sampling": sampling}
    with pytest.raises(NotApplicable, match="num_beams=4"):
        generation_settings({"num_beams": 4})


def test_one_begin_token_whether_the_template_or_the_tokenizer_writes_it():
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    costs = []
    for begin in ("", "<s>"):
        words = cases.tokenizer(template=begin + template)
        words.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        assert words("a").input_ids[0] == words.bos_token_id == 1
        model = cases.build(transformers.LlamaForCausalLM, transformers.LlamaConfig(**cases.text_config(words)))
        subject = Subject(model, words)
        with subject.applied() as run:
            answers = answering(subject, run)
            ((text, _),) = answers.write([lambda: turns_of_visuals([], "Why?")], max_new_tokens=6)
            costs.append((text, answers.meter.flops["prefill"]))
    assert costs[0] == costs[1]


def test_what_a_model_cannot_be_asked():
    model, processor = cases.family("llava")
    words = cases.tokenizer(template="{% for m in messages %}{{ m.content }}{% endfor %}")
    text_model = cases.build(transformers.LlamaForCausalLM, transformers.LlamaConfig(**cases.text_config(words)))
    (seen, *_) = conversations()
    with Subject(text_model, words).applied() as run:
        blind = answering(Subject(text_model, words), run)
        with pytest.raises(NotApplicable, match="no processor that takes any"):
            blind.write([lambda: seen], max_new_tokens=2)
        assert len(blind.write([lambda: turns_of_visuals([], "Why?")], max_new_tokens=2)) == 1
        with pytest.raises(NotApplicable, match="no chat template"):
            answering(Subject(text_model, cases.tokenizer()), run)
    with (
        Subject(model, processor).applied() as run,
        pytest.raises(NotApplicable, match="does not fit into the model's 1024"),
    ):
        answering(Subject(model, processor), run).write([lambda: turns_of_visuals([], "Why? " * 600)], max_new_tokens=2)


# The task without lmms-eval ---------------------------------------------------------------------------------------------


@pytest.fixture
def absent(monkeypatch):
    """No lmms-eval here, whatever is installed."""
    monkeypatch.setattr("sparing.evaluate.tasks.lmms.find_spec", lambda name: None)


def test_without_lmms_eval_it_says_where_to_put_it(absent, tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match=r"not installed here: .*pip install 'sparing\[vlm\]'.*--vlm-python"):
        LmmsTask("mme").check()
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "arithmetic-llama", "--suite", "vlm"]) != 0
    shown = capsys.readouterr().err
    assert "lmms-eval is not installed here" in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "runs").exists()


def test_settings_and_interpreters_that_are_wrong(tmp_path):
    with pytest.raises(ValueError, match="limit=0: expected at least 1"):
        LmmsTask("mme", limit=0).check()
    with pytest.raises(ValueError, match="batch=0"):
        LmmsTask("mme", batch=0).check()
    with pytest.raises(ValueError, match="expected a folder of YAML files"):
        LmmsTask("mme", include=tmp_path / "none").check()
    with pytest.raises(ValueError, match="is no Python that runs"):
        LmmsTask("mme", python=tmp_path / "python").check()
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\n")
    silent.chmod(0o755)
    with pytest.raises(ValueError, match="is no Python: it runs, and does not answer"):
        LmmsTask("mme", python=silent).check()
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(ValueError, match=r"lacks 'lmms_eval', 'sparing': .*environment of its own"):
        LmmsTask("mme", python=bare).check()


def test_a_process_that_breaks_off_is_one_line(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = -c ] && { echo "[]"; exit 0; }\n'
        'echo "[0.5, \\"half\\"]"; echo first >&2; echo Killed >&2; exit 9\n'
    )
    broken.chmod(0o755)
    model, processor = cases.family("llava")
    told = []
    with pytest.raises(ValueError, match="ended with 9 on the task mme: Killed"):
        LmmsTask("mme", python=broken).measure(
            Subject(model, processor), seed=0, on_step=lambda *step: told.append(step)
        )
    assert told[-1] == (0.5, "half")


def test_names_and_files(tmp_path):
    assert task_class("lmms") is LmmsTask
    assert len(SUITES["vlm"]) == 9
    assert LmmsTask("mine").files() == ()
    for name in ("mine.yaml", "data/p.parquet", "__pycache__/u.pyc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert LmmsTask("mine", include=tmp_path).files() == (tmp_path / "data/p.parquet", tmp_path / "mine.yaml")


def counted(values):
    """Right pairs less wrong ones: a figure of lists, as MME's and POPE's are."""
    return float(sum(1 if gold == pred else -1 for gold, pred in values))


def judged(values, args):
    """One that writes a file."""
    raise AssertionError("asked again")


def test_figures_that_are_no_means(monkeypatch):
    """Their interval is lmms-eval's own aggregation, resampled; never of one that writes files or asks a judge."""
    monkeypatch.setattr("sparing.evaluate.tasks.lmms_results.version", lambda name: "0")
    metrics = {"net": counted, "judged": judged, "submission": judged, "share": None, "other": counted}
    task = SimpleNamespace(aggregation=lambda: metrics, higher_is_better=lambda: dict.fromkeys(metrics, True))
    rows = [
        {
            "doc_id": i,
            "target": "a",
            "filtered_resps": ["b"],
            "net": ("a", "a" if i % 3 else "b"),
            "judged": {},
            "submission": {},
        }
        | {"share": i % 2 == 0}
        for i in range(30)
    ]
    results = {"net,none": 10.0, "judged,none": 61.5, "submission,none": None, "share,none": 0.5}
    found = {"samples": {"mine": rows}, "results": {"mine": results}}
    model, processor = cases.family("llava")
    with Subject(model, processor).applied() as run:
        outcome = outcome_of(found, {"mine": task}, None, "mine", {}, Meter(run, model), 0)
        first = outcome_of(found, {"mine": task}, "share", "mine", {}, Meter(run, model), 0)
    assert list(outcome.figures)[:3] == ["net", "judged", "share"]
    net, asked, share = (outcome.figures[name] for name in ("net", "judged", "share"))
    assert net.value == 10
    assert -10 < net.low < 10 < net.high < 30
    assert (asked.value, asked.low, asked.n) == (61.5, None, 30)
    assert share.value == 0.5
    assert share.low > 0.3
    assert outcome.items == {"share": {str(i): float(i % 2 == 0) for i in range(30)}}
    assert first.main == "share"
    assert outcome.details["answers"][0] == {"item": "mine/0", "gold": "a", "answer": "['b']"}
    assert len(outcome.details["answers"]) == 20


# The whole way ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def python(request, monkeypatch, tmp_path):
    """The interpreter of an environment that has lmms-eval."""
    found = request.config.getoption("--vlm-python")
    if found is None:
        pytest.skip("needs --vlm-python, the Python of an environment that has lmms-eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return Path(found).absolute()


YAML = """task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: squares.parquet}}}}
output_type: {kind}
test_split: test
doc_to_visual: picture
doc_to_text: question
doc_to_target: {target}
{more}
"""
MORE = {
    "squares": "generation_kwargs: {max_new_tokens: 6}\n"
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]",
    "chosen": "doc_to_choice: choices\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]",
}


@pytest.fixture
def folder(tmp_path):
    """`answers -> a folder of two tasks`: one writes, one chooses; both on the same drawn pictures."""
    import datasets

    def make(answers):
        at = tmp_path / "tasks"
        at.mkdir()
        rows = [
            {
                "picture": square(c),
                "question": f"Which colour is {i}?",
                "answer": a,
                "choices": list(COLOURS),
                "gold": i,
            }
            for i, (c, a) in enumerate(zip(COLOURS, answers, strict=True))
        ]
        features = {name: datasets.Value("string") for name in ("question", "answer")}
        kinds = {
            "picture": datasets.Image(),
            "choices": datasets.List(datasets.Value("string")),
            "gold": datasets.Value("int64"),
        }
        datasets.Dataset.from_list(rows, features=datasets.Features(features | kinds)).to_parquet(
            at / "squares.parquet"
        )
        for name, kind, target in (("squares", "generate_until", "answer"), ("chosen", "multiple_choice", "gold")):
            (at / f"{name}.yaml").write_text(YAML.format(name=name, kind=kind, target=target, more=MORE[name]))
        return at

    return make


def asked_of(i):
    return turns_of_visuals([square(COLOURS[i])], f"Which colour is {i}?")


@pytest.mark.parametrize("policies", [POLICIES, VICA], ids=["skip", "vica"])
def test_lmms_eval_asks_a_model_under_policies(python, folder, policies):
    subject = Subject(*cases.family("llava"), policies)
    own = [alone(subject, asked_of(i)) for i in range(4)]
    stock = [alone(Subject(subject.model, subject.processor), asked_of(i)) for i in range(4)]
    assert own != stock
    # Right by construction on the second and the last; the metric strips spaces.
    gold = ["no", own[1].strip(), "no", own[3].strip()]
    task = LmmsTask("squares", include=folder(gold), batch=3, python=python)
    told = []
    outcome = task.measure(subject, seed=0, on_step=lambda done, words: told.append(done))
    assert outcome.main == "exact_match"
    assert outcome.items["exact_match"] == {"0": 0.0, "1": 1.0, "2": 0.0, "3": 1.0}
    accuracy = outcome.figures["exact_match"]
    assert (accuracy.value, accuracy.n, accuracy.unit, accuracy.better) == (0.5, 4, "share", "higher")
    assert accuracy.low == pytest.approx(0.15, abs=0.005)  # Wilson, 2 of 4
    assert accuracy.high == pytest.approx(0.85, abs=0.005)
    assert outcome.figures["output_tokens"].value <= 6
    assert outcome.figures["flops_share"].value < 1
    assert 0 < outcome.figures["seconds_per_solved"].value < 60
    assert [shown["answer"] for shown in outcome.details["answers"]] == [str([text]) for text in own]
    assert told == sorted(told)
    assert max(told) > 0.9


def test_lmms_eval_chooses_the_least_loss(python, folder):
    subject = Subject(*cases.family("llava"), (SkipModules(attention=[1]),))
    at = folder(COLOURS)
    with subject.applied() as run:
        right = []
        for i in range(4):
            found = answering(subject, run).score([(lambda i=i: asked_of(i), f" {c}") for c in COLOURS])
            losses = [-total / tokens for total, _, tokens in found]
            right.append(float(losses.index(min(losses)) == i))
    outcome = LmmsTask("chosen", include=at, limit=3, python=python).measure(subject, seed=0)
    assert list(outcome.items["acc"].values()) == right[:3]
    assert outcome.figures["acc"].n == 3
    assert "output_tokens" not in outcome.figures


def test_lmms_eval_refuses_in_one_line(python, folder, tmp_path, monkeypatch, capsys):
    at = folder(COLOURS)
    subject = Subject(*cases.family("llava"))
    with pytest.raises(ValueError, match="knows no task 'square'"):
        LmmsTask("square", include=at, python=python).measure(subject, seed=0)
    with pytest.raises(ValueError, match="no figure 'acc'; it has exact_match"):
        LmmsTask("squares", include=at, metric="acc", limit=1, python=python).measure(subject, seed=0)


@pytest.mark.parametrize("policies", [(), VICA], ids=["stock", "vica"])
def test_lmms_eval_in_the_command_beside_other_tasks(python, folder, tmp_path, monkeypatch, capsys, policies):
    """A checkpoint too that comes with its policies, such as ViCA."""
    at = folder(COLOURS)
    model, processor = cases.family("llava")
    sparing.save(model, tmp_path / "model", policies=list(policies), processor=processor)
    monkeypatch.chdir(tmp_path)
    task = json.dumps({"kind": "lmms", "task": "squares"})
    words = ["eval", "model", "--task", task, "--include", str(at), "--vlm-python", str(python), "--limit", "2"]
    assert main(words) == 0
    assert "exact_match" in capsys.readouterr().out
    found = json.loads((tmp_path / "runs/eval/results.json").read_text())
    assert found["squares"]["figures"]["exact_match"]["n"] == 2
    share = found["squares"]["figures"]["flops_share"]["value"]
    assert share < 1 if policies else share == 1


def test_stopping_stops_the_process(python, folder):
    at = folder(COLOURS)

    def on_step(done, words):
        if words == "lmms-eval is starting":
            return
        if done > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LmmsTask("squares", include=at, batch=1, python=python).measure(
            Subject(*cases.family("llava")), seed=0, on_step=on_step
        )
    running = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
    assert not any(b"lmms_worker" in line and str(python).encode() in line for line in running)
