"""The model card: valid front matter, costs that are the ledger's, text of strangers that stays text."""

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import sparing
from checkpoint_cases import save_skipping
from models import llama, llava, text_batch
from sparing.checkpoint import counted
from sparing.checkpoint.card import card
from sparing.checkpoint.counted import Counted, count
from sparing.policies import SkipGPT, SkipModules, ViCA
from sparing.tokens import Group, TokenMap


def test_front_matter_and_text_of_strangers(tmp_path):
    """YAML that the hub reads, whatever names, arguments and figures hold."""
    nasty = 'a"b: `c` | <script>\n---\n# d\u2028\x7f' + "x" * 9000
    text = card(
        name=nasty,
        base={"license": nasty, "base_model": nasty, "pipeline_tag": "text-generation", "tags": ["llama"]},
        policies=[f"Other({nasty!r})", "``"],
        counted=Counted(3, 0, reason=nasty),
        figures={nasty: nasty, "speed | up": 1.5},
    )
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "sparing"
    assert front["license"].startswith('a"b: `c`')
    assert len(text) < 6000
    assert text.count("\n---\n") == 1
    assert "<script>" not in text.replace("`Other", "").split("## What")[1]
    assert [line for line in text.splitlines() if line.startswith("# ")] == [
        line for line in text.splitlines() if line.startswith("# a")
    ]
    data = ModelCard.load(sparing.save(llava(), tmp_path / "saved", [ViCA([0])]) / "README.md").data
    assert data.pipeline_tag == "image-text-to-text"
    assert data.tags == ["sparing", "llava", "vica"]


@torch.no_grad()
def test_costs_are_those_of_a_run():
    """The reference prompt counted by hand-made apply; a picture for vision; nothing of the model or the noise changes."""
    state = torch.get_rng_state()
    found = count(llama(), [SkipModules(mlp=[1])])
    assert torch.equal(torch.get_rng_state(), state)
    tokens = TokenMap.from_groups(torch.full((1, counted.TEXT), int(Group.TEXT)))
    with sparing.apply(llama(), SkipModules(mlp=[1]), tokens=tokens) as run:
        out = llama()(input_ids=torch.ones(1, counted.TEXT, dtype=torch.long), use_cache=True)
        llama()(input_ids=torch.ones(1, 1, dtype=torch.long), past_key_values=out.past_key_values)
    expected = run.ledger.cost()
    for phase in ("prefill", "decode"):
        ours, theirs = (dict(getattr(cost, phase).flops) for cost in (found.cost, expected))
        assert {**ours, "lm_head": 0} == {**theirs, "lm_head": 0}
    assert found.cost.kv_bytes == expected.kv_bytes
    vision = count(llava(), [ViCA([0])])
    assert vision.cost.prefill.total < 0.6 * vision.dense.prefill.total


@torch.no_grad()
def test_what_is_not_counted_says_why(tmp_path, monkeypatch):
    """Routers before they ran, large models; afterwards the latest prompt, which a save leaves as it was."""
    save_skipping(tmp_path / "saved")
    model, _ = sparing.load(tmp_path / "saved")
    assert "not counted: SkipGPT decides by what it reads" in (tmp_path / "saved" / "README.md").read_text()
    model(**text_batch("left"))
    ledger = sparing.run_of(model).ledger
    text = (sparing.save(model, tmp_path / "again") / "README.md").read_text()
    assert "the latest prompt before saving (3 x 17 tokens, 0 decoded)" in text
    assert "| router |" in text
    assert sparing.run_of(model).ledger is ledger
    sparing.save(llama(), tmp_path / "fixed", [SkipModules(mlp=[1])])
    model, _ = sparing.load(tmp_path / "fixed")
    model(**text_batch("left"))
    ledger = sparing.run_of(model).ledger
    assert count(model, [SkipModules(mlp=[1])]).cost is not None
    assert sparing.run_of(model).ledger is ledger
    monkeypatch.setitem(counted.BUDGET, "cpu", 10)
    assert "of this size" in count(llama(), [SkipModules(mlp=[1])]).reason


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, pytest.param("cuda", marks=pytest.mark.gpu)], ids=str)
@torch.no_grad()
def test_policies_follow_the_model(dtype, tmp_path):
    """`to` after load moves both; `meta` stands for another device where there is none."""
    if dtype == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    save_skipping(tmp_path / "saved")
    model, _ = sparing.load(tmp_path / "saved")
    router = sparing.run_of(model).policy.parts()[0]
    batch = text_batch("left")
    before = model(**batch).logits
    model.to(dtype)
    first = next(model.parameters())
    assert {(p.dtype, p.device) for p in router.parameters()} == {(first.dtype, first.device)}
    after = model(**{k: v.to(first.device) for k, v in batch.items()}).logits
    if dtype != torch.bfloat16:  # there routers near a tie may choose otherwise
        mask = batch["attention_mask"].bool()
        torch.testing.assert_close(after.cpu()[mask].float(), before[mask], rtol=1e-4, atol=1e-4)
    assert model.generate(**{k: v.to(first.device) for k, v in batch.items()}, max_new_tokens=2).shape[1] == 19
    model.to("meta")
    assert all(p.is_meta for p in router.parameters())
    sparing.release(model)
    assert "_apply" not in vars(model)


@torch.no_grad()
def test_policies_that_stayed_behind_are_brought_along():
    """A model and routers that were made on different devices meet at the first prompt."""
    model = llama()
    policy = SkipGPT.for_model(model)
    seen = []
    policy.to = lambda device: seen.append(device)
    policy.register_buffer("elsewhere", torch.empty(1, device="meta"))
    with sparing.apply(model, policy):
        model(**text_batch("left"))
    assert seen == [torch.device("cpu")]
