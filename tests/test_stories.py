"""A real pretrained model no one here made: full plan unchanged to the character; skipped layers as an oracle says."""

import gzip
from pathlib import Path

import pytest
import torch

import sparing
from sparing.policies import SkipModules

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not (DATA / "stories").is_dir(), reason="the shared data folder is absent"),
]
ATTENTION, MLP = [0, 2], [3]


@pytest.fixture(scope="module")
def stories():
    return sparing.load(DATA / "stories/stories260K-hf", dtype="float32")


@pytest.fixture(scope="module")
def text():
    with gzip.open(DATA / "tinystories/valid.txt.gz", "rt", encoding="utf8") as file:
        whole = file.read()
    return [s.strip() for s in whole.split("<|endoftext|>") if s.strip()][:12]


@pytest.mark.parametrize("execute", ["dense", "gathered"])
@pytest.mark.parametrize("force", [False, True])
def test_full_plan_tells_the_same_story(stories, execute, force):
    model, tokenizer = stories
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    stock = tokenizer.decode(model.generate(**inputs, max_new_tokens=200, do_sample=False)[0])
    assert "there was a little girl named Lily. She loved to play outside in the park." in stock
    with sparing.apply(model, execute=execute, force=force):
        ours = tokenizer.decode(model.generate(**inputs, max_new_tokens=200, do_sample=False)[0])
    assert ours == stock


def oracle_loss(model, ids):
    """Mean loss with some modules left out, in plain PyTorch on the state dict: rotary, grouped heads, tied output."""
    w = model.state_dict()
    config = model.config
    heads, kv, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    t = ids.shape[1]
    theta = config.rope_parameters["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)
    angle = torch.outer(torch.arange(t), theta)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    def turn(x):
        return x * cos + torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1) * sin

    x = w["model.embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}."
        if i not in ATTENTION:
            h = norm(x, w[at + "input_layernorm.weight"])
            q, k, v = ((h @ w[f"{at}self_attn.{n}_proj.weight"].T).view(1, t, -1, dim).transpose(1, 2) for n in "qkv")
            k, v = (y.repeat_interleave(heads // kv, 1) for y in (turn(k), v))
            score = turn(q) @ k.transpose(-1, -2) / dim**0.5
            score = score.masked_fill(torch.ones(t, t).triu(1).bool(), float("-inf"))
            mixed = (score.softmax(-1) @ v).transpose(1, 2).reshape(1, t, -1)
            x = x + mixed @ w[at + "self_attn.o_proj.weight"].T
        if i not in MLP:
            h = norm(x, w[at + "post_attention_layernorm.weight"])
            gate = torch.nn.functional.silu(h @ w[at + "mlp.gate_proj.weight"].T)
            x = x + (gate * (h @ w[at + "mlp.up_proj.weight"].T)) @ w[at + "mlp.down_proj.weight"].T
    logits = norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item()


@pytest.mark.parametrize("execute", ["dense", "gathered"])
def test_skipped_layers_cost_and_lose_what_an_oracle_says(stories, text, execute):
    model, tokenizer = stories
    policy = SkipModules(ATTENTION, MLP)
    config = model.config
    d, m, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_width, kv_width = config.num_attention_heads * dim, config.num_key_value_heads * dim
    with torch.no_grad():
        for story in text:
            ids = tokenizer(story, return_tensors="pt").input_ids[:, :400]
            t = ids.shape[1]
            with sparing.apply(model, policy, execute=execute) as run:
                out = model(ids, labels=ids, use_cache=True)
            assert out.loss.item() == pytest.approx(oracle_loss(model, ids), rel=1e-5)
            cost = run.ledger.cost()
            layers = config.num_hidden_layers
            running = layers - len(ATTENTION)
            assert cost.kv_bytes == running * t * 2 * kv_width * 4
            if execute == "gathered":
                held = sum(
                    2 * c.keys.numel() * c.keys.element_size() for c in out.past_key_values.layers if c.keys is not None
                )
                assert held == cost.kv_bytes
            assert cost.prefill.flops["attention_projections"] == running * t * 4 * d * q_width
            assert cost.prefill.flops["attention_kv"] == running * t * 4 * d * kv_width
            assert cost.prefill.flops["attention_scores"] == running * t * (t + 1) // 2 * 4 * q_width
            assert cost.prefill.flops["mlp"] == (layers - len(MLP)) * t * 6 * d * m
            assert cost.prefill.flops["lm_head"] == t * 2 * d * config.vocab_size
            assert cost.decode.total == 0
            states = run.ledger.states()
            for i in range(layers):
                assert ((states[i, 0] == 3).all()) == (i not in ATTENTION)
                assert ((states[i, 1] == 3).all()) == (i not in MLP)


def test_skipping_costs_quality_and_the_real_loss_is_as_published(stories, text):
    """The stock model's loss on real stories is near the published 1.30; skipping layers is worse."""
    model, tokenizer = stories
    losses = {}
    with torch.no_grad():
        for name, policy in (("dense", SkipModules()), ("skipped", SkipModules(ATTENTION, MLP))):
            with sparing.apply(model, policy):
                each = [
                    model(ids, labels=ids).loss.item()
                    for ids in (tokenizer(s, return_tensors="pt").input_ids[:, :400] for s in text)
                ]
            losses[name] = sum(each) / len(each)
    assert 1.15 < losses["dense"] < 1.45
    assert losses["skipped"] > losses["dense"] + 0.2
