"""`sparing eval`: what it asks, writes, resumes and refuses."""

import json

import pytest

import sparing
from sparing import zoo
from sparing.cli import main
from sparing.evaluate.tasks import harness_loading
from sparing.policies import SkipModules
from sparing.worlds import arithmetic

pytestmark = [
    # What lm-eval and the packages below it warn about is theirs to mend.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
MODEL = "arithmetic-llama"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Problems, a task of lm-eval's form, a text."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    drawn = arithmetic.examples("test", 3, seed=0, tasks=["copy", "sort"])
    rows = [{"question": e.prompt, "answer": e.solution, "choices": [e.solution, "1 2 3"], "gold": 0} for e in drawn]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: p.jsonl}}\noutput_type: multiple_choice\n"
        "test_split: test\ndoc_to_text: question\ndoc_to_choice: choices\ndoc_to_target: gold\nmetric_list: [{metric: acc}]\n"
    )
    (tmp_path / "t.txt").write_text(zoo.page("arithmetic"))
    return tmp_path


GENERATION = json.dumps({"kind": "generation", "data": "p.jsonl", "stop": ["\n"], "max_new_tokens": 30})


def results(out="runs/eval"):
    with open(f"{out}/results.json") as file:
        return json.load(file)


def test_all_kinds_in_one_run_and_nothing_twice(folder, capsys, monkeypatch):
    words = ["eval", MODEL, "--tasks", "mine.yaml", "--task", GENERATION, "--text", "t.txt", "--limit", "4"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    for part in (
        "mine.yaml",
        "acc",
        "chance 0.5",
        "seconds_per_solved",
        "bits_per_byte",
        "95% interval",
        "stock model",
    ):
        assert part in shown
    found = results()
    assert list(found) == ["mine.yaml", "generation of p.jsonl", "perplexity of t.txt"]
    assert found["mine.yaml"]["figures"]["acc"]["n"] == 4
    assert len(found["generation of p.jsonl"]["items"]["accuracy"]) == 4
    record = json.loads((folder / "runs/eval/run.json").read_text())
    assert record["status"] == "finished"
    assert record["figures"]["perplexity of t.txt"]["loss"]["low"] > 0

    def fail(*_, **__):
        raise AssertionError("asked again")

    monkeypatch.setattr("sparing.evaluate.tasks.harness._ask", fail)
    monkeypatch.setattr("sparing.evaluate.tasks.perplexity.measure_under", fail)
    assert main(words) == 0
    assert results() == found
    # Another limit is another task, other data another one too.
    assert main([*words[:4], "--limit", "3"]) == 70
    (folder / "p.jsonl").write_text((folder / "p.jsonl").read_text() * 2)
    assert main([*words[:4], "--limit", "4"]) == 70


def test_policies_are_saved_given_or_none(folder, capsys):
    model, tokenizer = sparing.load(zoo.path(MODEL))
    sparing.save(model, folder / "saved", [SkipModules([0, 1, 2, 3], [0, 1, 2, 3])], processor=tokenizer)
    share = {}
    for name, more in {
        "saved": [],
        "given": ["--policy", '{"SkipModules": {"mlp": [2]}}'],
        "none": ["--policy", "{}"],
        "listed": ["--policy", '[{"class": "SkipModules", "arguments": {"mlp": [2]}}]'],
    }.items():
        assert main(["eval", str(folder / "saved"), "--task", GENERATION, "--limit", "2", "--out", name, *more]) == 0
        share[name] = results(name)["generation of p.jsonl"]["figures"]["flops_share"]["value"]
    assert share["saved"] < share["given"] < share["none"] == 1
    assert share["listed"] == share["given"]
    assert "SkipModules" in capsys.readouterr().out


def test_a_model_that_cannot_be_asked_is_told_not_fatal(folder, capsys):
    long = json.dumps({"kind": "generation", "data": "p.jsonl", "max_new_tokens": 100000})
    assert main(["eval", MODEL, "--task", long, "--text", "t.txt"]) == 0
    assert "not applicable: a prompt of" in capsys.readouterr().out
    found = results()
    assert "do not fit" in found["generation of p.jsonl"]["not_applicable"]
    assert "loss" in found["perplexity of t.txt"]["figures"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to ask"),
        (["--tasks", "none.yaml"], "does not exist"),
        (["--text", "none.txt"], "does not exist"),
        (["--text", "t.txt", "--batch", "big"], "--batch big"),
        (["--task", "{"], "--task: no JSON"),
        (["--task", "@none.json"], "there is no such file"),
        (["--task", '{"data": "p.jsonl"}'], '"kind"'),
        (["--task", '{"kind": "generaton"}'], "did you mean generation"),
        (["--task", '{"kind": "generation", "data": "p.jsonl", "verifer": "math"}'], "verifer"),
        (["--task", '{"kind": "generation", "data": "p.jsonl", "verifier": "code"}'], "--allow-code"),
        (["--task", '{"kind": "generation", "data": "p.jsonl", "answer": "gone"}'], "no field 'gone'"),
        (["--text", "t.txt", "--policy", "[1]"], "--policy: expected"),
        (["--text", "t.txt", "--policy", '{"SkipModule": {}}'], "SkipModules"),
        (["--text", "t.txt", "--policy", '{"SkipModules": {"mlp": [99]}}'], "layer 99"),
        (["--text", "t.txt", "--text", "t.txt"], "asked twice"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, words, message):
    assert main(["eval", MODEL, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_a_missing_extra_names_its_cure(folder, capsys, monkeypatch):
    def absent(*_):
        raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")

    monkeypatch.setattr(harness_loading, "quiet", absent)
    assert main(["eval", MODEL, "--tasks", "hellaswag"]) == 2
    assert "pip install 'sparing[eval]'" in capsys.readouterr().err
