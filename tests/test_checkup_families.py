"""`sparing check` on every vision family with its own processor, on text families, and on models at the edge of what is usual."""

import json

import pytest
import torch
import transformers

import processors as cases
from processors import CASES, family, text_config, tokenizer
from sparing.cli import main
from sparing.evaluate.checkup import running
from sparing.evaluate.checkup import timing as timing_of
from sparing.policies import SkipModules

ALWAYS = ("smolvlm", "qwen3_vl")
"""Pictures by the row with masks, and positions of several axes."""
SOME = "DropTokens,FastV"


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    """Timing is the slow part on tiny models, and what it finds is the machine's."""
    monkeypatch.setattr(timing_of, "SLOW", 0.0)
    monkeypatch.setattr(timing_of, "BATCHES", (4,))
    real = running.check_costs
    monkeypatch.setattr(running, "check_costs", lambda probe, subject, **_: real(probe, subject, seconds=0.0, steps=2))


def check(folder, out, *more):
    """The exit code, and the figures; a page is always there."""
    code = main(["check", str(folder), "--quick", "--device", "cpu", "--out", str(out), *more])
    assert code in (0, 1)
    page = (out / "check.html").read_text()
    assert page.rstrip().endswith("</html>")
    figures = json.loads((out / "run.json").read_text())["figures"]
    assert figures["safe"] == (code == 0)
    broken = [f for f in figures["findings"] if "broke off" in f["sentence"]]
    assert broken == []
    return code, figures


def wrong(figures):
    return [(f["subject"], f["name"], f["sentence"]) for f in figures["findings"] if f["verdict"] == "fails"]


def saved(folder, model, words=None):
    for part in (model, words):
        if part is not None:
            part.save_pretrained(folder)
    return folder


def causal(kind, words, **more):
    """A seeded text model for a tokenizer."""
    config = getattr(transformers, f"{kind}Config")(**text_config(words, **more))
    return cases.build(getattr(transformers, f"{kind}ForCausalLM"), config)


MOE = {"moe_intermediate_size": 20, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 10}


@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_vision_families_with_their_processors(name, tmp_path):
    saved(tmp_path / "model", *family(name))
    policies = ["--policies", SOME] if name in ALWAYS else []
    code, figures = check(tmp_path / "model", tmp_path / "out", *policies)
    assert (code, wrong(figures)) == (0, [])
    assert figures["inputs"]["told"].startswith("two random pictures, one random picture, and text alone (English text")
    assert figures["policies"]["FastV"]["verdict"] == "ok"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "more"), [("Llama", {}), ("Gemma2", {"head_dim": 10}), ("Qwen3Moe", MOE)])
def test_text_families(kind, more, tmp_path):
    words = tokenizer()
    saved(tmp_path / "model", causal(kind, words, **more), words)
    code, figures = check(tmp_path / "model", tmp_path / "out")
    assert (code, wrong(figures)) == (0, [])


def edge_no_tokenizer(folder):
    return saved(folder, causal("Llama", tokenizer()))


def edge_no_pad_token(folder):
    words = tokenizer()
    model = causal("Llama", words, pad_token_id=None)
    words.pad_token = None
    assert words.pad_token_id is None
    return saved(folder, model, words)


def edge_64_positions(folder):
    words = tokenizer()
    return saved(folder, causal("Llama", words, max_position_embeddings=64), words)


def edge_window_of_5(folder):
    words = tokenizer()
    return saved(folder, causal("Mistral", words, head_dim=10, sliding_window=5), words)


def edge_bfloat16(folder):
    words = tokenizer()
    return saved(folder, causal("Llama", words).to(torch.bfloat16), words)


def edge_one_layer(folder):
    words = tokenizer()
    return saved(folder, causal("Llama", words, num_hidden_layers=1), words)


def edge_pictures_without_chat_template(folder):
    model, processor = family("qwen3_vl")
    saved(folder, model, processor)
    for file in folder.glob("chat_template*"):
        file.unlink()
    return folder


def edge_pictures_and_64_positions(folder):
    model, processor = cases.CASES["internvl"]()
    model.config.text_config.max_position_embeddings = 64
    return saved(folder, model, processor)


EDGES = {name.removeprefix("edge_"): make for name, make in list(globals().items()) if name.startswith("edge_")}
RARE = [pytest.param(name, marks=pytest.mark.slow) if "and_64" in name or "bfloat" in name else name for name in EDGES]


@pytest.mark.parametrize("name", RARE)
def test_models_at_the_edge(name, tmp_path):
    policy = "FastV" if "pictures" in name else "SkipModules"
    code, figures = check(EDGES[name](tmp_path / "model"), tmp_path / "out", "--policies", policy)
    assert (code, wrong(figures)) == (0, [])


def test_a_checkpoint_with_policies(tmp_path):
    import sparing

    words = tokenizer()
    sparing.save(causal("Llama", words), tmp_path / "model", policies=[SkipModules([1])], processor=words)
    code, figures = check(tmp_path / "model", tmp_path / "out")
    assert (code, wrong(figures)) == (0, [])
    assert list(figures["policies"]) == ["as saved"]


def test_weights_that_are_no_numbers(tmp_path, capsys):
    model, processor = cases.CASES["smolvlm"]()
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        model.model.text_model.layers[2].mlp.up_proj.weight[3, 5] = torch.inf
        assert bool(weight.isfinite().all())
    saved(tmp_path / "model", model, processor)
    code, figures = check(tmp_path / "model", tmp_path / "out", "--policies", "SkipModules")
    assert code == 1
    assert any("text_model.layers.2.mlp.up_proj.weight" in line for _, name, line in wrong(figures) if name == "loads")
    assert "Do not use sparing on this model yet" in capsys.readouterr().out


def test_logits_that_are_no_numbers_name_the_layer(tmp_path):
    words = tokenizer()
    model = causal("Llama", words)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    saved(tmp_path / "model", model, words)
    code, figures = check(tmp_path / "model", tmp_path / "out", "--policies", "SkipModules")
    assert code == 1
    (line,) = [line for subject, name, line in wrong(figures) if (subject, name) == ("the model", "loads")]
    assert "layer 1" in line


def test_a_processor_that_breaks_is_a_finding(tmp_path):
    """The other checks go on, without pictures."""
    model, processor = family("qwen3_vl")
    saved(tmp_path / "model", model, processor)
    file = tmp_path / "model" / "processor_config.json"
    settings = json.loads(file.read_text())
    settings["image_processor"]["image_mean"] = [0.5]
    file.write_text(json.dumps(settings))
    code, figures = check(tmp_path / "model", tmp_path / "out", "--policies", "FastV")
    assert code == 1
    ((subject, name, line),) = wrong(figures)
    assert (subject, name) == ("the model", "pictures")
    assert line.startswith(
        "The processor makes no pictures that the model reads: ValueError: mean must have 3 elements"
    )
    assert figures["policies"]["FastV"]["verdict"] == "not applicable"
