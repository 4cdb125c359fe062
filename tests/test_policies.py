"""What policies refuse, when they are idle, how they rank, and facts about hiding that plans rest on."""

import dataclasses

import pytest
import torch

import sparing
from oracles import Llama, embeddings
from policy_cases import streamed
from sparing.execute.views import LayerView
from sparing.plan import LayerPlan, Policy
from sparing.policies import DLLM, EnterLate, FastV, MoD, PyramidDrop, SkipGPT, SkipModules, ViCA, WaitKMask
from sparing.policies.gates import choose
from sparing.policies.ranking import beyond_best, last_of, order_of, share_of
from sparing.tokens import Group, TokenMap


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: FastV(0), "layer >= 1"),
        (lambda m: FastV(2, 1.5), "between 0 and 1"),
        (lambda m: FastV(2, rank_by="mean"), "release"),
        (lambda m: FastV(9), r"layers 0\.\.2"),
        (lambda m: PyramidDrop([2, 1]), "ascending"),
        (lambda m: PyramidDrop([1, 2], [0.5]), "one a stage"),
        (lambda m: PyramidDrop([1, 2], [0.5, 2]), "between 0 and 1"),
        (lambda m: PyramidDrop([1, 7]), "layer 7 does not exist"),
        (lambda m: SkipGPT(42, 3, router="deep"), "linear"),
        (lambda m: SkipGPT(42, 3, threshold=-0.1), "between 0 and 1"),
        (lambda m: SkipGPT(41, 3), "for_model"),
        (lambda m: SkipGPT.for_model(m, "fast"), "paper"),
        (lambda m: MoD(42, 3, capacity=0), "capacity"),
        (lambda m: MoD(42, 3, route="heads"), "modules, block"),
        (lambda m: MoD(42, 2), "at least one"),
        (lambda m: MoD(42, 4), "for_model"),
        (lambda m: DLLM(42, 3, start_layer=3), "nothing to route"),
        (lambda m: DLLM(42, 3, reserve=-1), "0 or more"),
        (lambda m: WaitKMask(0), "k >= 1"),
        (lambda m: FastV(2) & EnterLate(2), "they are away"),
        (lambda m: FastV(2) & ViCA([0]), "not read"),
        (lambda m: SkipModules([1]) & FastV(2), "not read"),
        (lambda m: PyramidDrop([1]) & EnterLate(2), "they are away"),
    ],
)
def test_refusals(make, message, tiny_llama):
    with pytest.raises(ValueError, match=message):
        sparing.apply(tiny_llama, make(tiny_llama))


@pytest.mark.parametrize("policy", [FastV(2), PyramidDrop([1]), ViCA([1]), WaitKMask(1)], ids=repr)
@torch.no_grad()
def test_text_alone_is_left_as_it_is(policy, tiny_llava, llava_batch):
    batch = {k: v[-1:] for k, v in llava_batch("left").items() if k != "pixel_values"}
    stock = tiny_llava(**batch).logits
    with sparing.apply(tiny_llava, policy):
        assert torch.equal(tiny_llava(**batch).logits, stock)


def test_ranking():
    """Equal scores go to the earlier token; halves round up; a share that binary cannot hold is not cut short."""
    scores = torch.tensor([[0.2, 0.5, 0.5, 0.2, 0.9]])
    candidates = torch.tensor([[True, True, True, True, False]])
    assert order_of(scores, candidates)[:, :4].tolist() == [[2, 0, 1, 3]]
    assert beyond_best(scores, candidates, torch.tensor([3])).tolist() == [[False, False, False, True, False]]
    assert last_of(torch.tensor([[True, True, False], [False, True, True]])).tolist() == [[1], [2]]
    ten = torch.ones(1, 10, dtype=torch.bool)
    assert share_of(ten, 0.3).item() == 3
    assert share_of(ten[:, :9], 0.5, nearest=True).item() == 5
    assert choose(torch.tensor([-99.0, 99.0]), 0.0).all()
    assert not choose(torch.tensor([-99.0, 99.0]), 1.0).any()


@torch.no_grad()
def test_ranking_by_all_never_looks_at_all_queries_at_once(tiny_llava, llava_batch, monkeypatch):
    widths = []
    scores = LayerView.scores
    monkeypatch.setattr(
        LayerView, "scores", lambda self, q, keys=None: widths.append(q.shape[1]) or scores(self, q, keys)
    )
    with sparing.apply(tiny_llava, FastV(2, rank_by="all", chunk=7)):
        tiny_llava(**llava_batch("left"))
    assert max(widths) == 7
    assert sum(widths) == llava_batch("left")["input_ids"].shape[1]


@pytest.mark.parametrize("execute", ["dense", "gathered"])
@torch.no_grad()
def test_wait_k_word_by_word(execute, tiny_llama, text_batch):
    """Target words fed one by one through the cache equal the training forward, which has them all."""
    batch = text_batch("none")
    ids, n = batch["input_ids"], batch["input_ids"].shape[1]
    whole = streamed(TokenMap.from_inputs(tiny_llama, batch))
    with sparing.apply(tiny_llama, WaitKMask(2), execute=execute, tokens=whole):
        trained = tiny_llama(ids).logits
    with sparing.apply(tiny_llama, WaitKMask(2, tokens=whole), execute=execute):
        out = tiny_llama(ids[:, : n // 2], use_cache=True)
        logits = [out.logits]
        for i in range(n // 2, n):
            out = tiny_llama(ids[:, i : i + 1], past_key_values=out.past_key_values)
            logits.append(out.logits)
    assert (torch.cat(logits, 1) - trained).abs().max() <= 1e-5 * trained.abs().max()


def test_wait_k_needs_segments(tiny_llama, text_batch):
    batch = text_batch("left")
    tokens = dataclasses.replace(streamed(TokenMap.from_inputs(tiny_llama, batch)), segment=None)
    with sparing.apply(tiny_llama, WaitKMask(2), tokens=tokens), pytest.raises(ValueError, match="segment"):
        tiny_llama(**batch)


class HideOne(Policy):
    """Token 4 cannot be read in layer 1."""

    def plan_attend(self, view):
        return LayerPlan(read=torch.arange(view.new.length).ne(4)[None]) if view.layer == 1 else LayerPlan()


@torch.no_grad()
def test_hiding_is_before_the_softmax(tiny_llama, text_batch):
    """Hidden before the softmax the rest sums to one; zeroed after it, it does not. A plan does the former."""
    batch = text_batch("none")
    m, (embeds, _) = Llama(tiny_llama), embeddings(tiny_llama, batch)
    x, everyone = embeds[0], torch.arange(embeds.shape[1])
    others = everyone[everyone != 4]
    start = x + m.attention(0, x, everyone, everyone)
    start = start + m.mlp(0, start)

    before = m.attention(1, start, everyone, others)
    weights = m.probabilities(1, start, everyone, everyone)
    assert torch.allclose(m.probabilities(1, start, everyone, others).sum(-1), torch.ones(()))
    assert (weights[:, :, others].sum(-1)[:, 4:] < 1).all()
    value = m.project(1, m.norm(start, "layers.1.input_layernorm"), "v", m.groups).repeat_interleave(
        m.heads // m.groups, 1
    )
    mixed = torch.einsum("hqk,khd->qhd", weights[:, :, others], value[others])
    after = mixed.flatten(1) @ m.weights["layers.1.self_attn.o_proj.weight"].T

    def finish(branch):
        y = start + branch
        y = y + m.mlp(1, y)
        y = y + m.attention(2, y, everyone, everyone)
        return m.logits(y + m.mlp(2, y))

    for execute in ("dense", "gathered"):
        with sparing.apply(tiny_llama, HideOne(), execute=execute):
            logits = tiny_llama(**batch).logits[0]
        scale = logits.abs().max()
        assert (logits - finish(before)).abs().max() <= 1e-5 * scale
        assert (logits - finish(after)).abs().max() > 1e-2 * scale


def test_presets():
    """Where paper and release differ, both are there by name."""
    assert (FastV.paper().rank_by, FastV.release().rank_by) == ("all", "last")
    assert (PyramidDrop().layers, PyramidDrop().keep) == ((8, 16, 24), (0.5, 0.5, 0.5))
    assert FastV(2).groups == (Group.IMAGE,)


def test_presets_of_routers(tiny_llama):
    paper, release = (SkipGPT.for_model(tiny_llama, preset) for preset in ("paper", "release"))
    assert (paper.router, paper.sample, release.router, release.sample) == ("linear", False, "mlp", True)
    assert not paper.training
    paper, release = (MoD.for_model(tiny_llama, preset) for preset in ("paper", "release"))
    assert (paper.route, paper.select, paper.layers, release.route, release.select) == (
        "block",
        "topk",
        (1,),
        "modules",
        "above",
    )
    release, baseline = DLLM.for_model(tiny_llama), DLLM.for_model(tiny_llama, "lrm-pruning")
    assert (release.evict, release.start_layer, baseline.evict, baseline.start_layer) == (True, 2, False, 0)
