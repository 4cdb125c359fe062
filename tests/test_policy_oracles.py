"""Design test 5: each policy without routers in plain PyTorch, against both executors, prompt and decode."""

import math

import pytest
import torch

import models
import sparing
from oracles import Llama, compare, embeddings, kinds, oracle_of_stock, which
from policy_cases import interleaved, streamed, wide
from sparing.policies import DropTokens, EnterLate, FastV, PyramidDrop, SkipModules, ViCA, WaitKMask
from sparing.tokens import Group
from vision_models import IMAGE, llava_mistral
from vision_models import llava_batch as vision_batch


@pytest.mark.parametrize(("build", "batch_of"), models.CASES)
def test_the_oracle_is_the_stock_model(build, batch_of):
    """The hand-written Llama computes what transformers' does."""
    model, batch = build(), batch_of("right")
    with torch.no_grad():
        stock, (embeds, _) = model(**batch).logits, embeddings(model, batch)
        for r, keep in enumerate(batch["attention_mask"].bool()):
            want = oracle_of_stock(Llama(model), embeds[r][keep])
            assert (stock[r][keep] - want).abs().max() <= 1e-5 * want.abs().max()
    assert len(kinds(batch["input_ids"][0].tolist())) == batch["input_ids"].shape[1] + 3


def test_skip_modules(tiny_llama, text_batch):
    def oracle(m, x, kind, n):
        everyone = torch.arange(len(x))
        for layer in range(m.depth):
            if layer not in (0, 2):
                x = x + m.attention(layer, x, everyone, everyone)
            if layer != 1:
                x = x + m.mlp(layer, x)
        return m.logits(x)

    compare(tiny_llama, text_batch, SkipModules([0, 2], [1]), oracle)


def test_skip_modules_of_pictures(tiny_llava, llava_batch):
    def oracle(m, x, kind, n):
        everyone, text = torch.arange(len(x)), which(kind, "text", "system")
        for layer in range(m.depth):
            rows = text if layer == 1 else everyone
            x = x.index_add(0, rows, m.attention(layer, x, rows, everyone))
            rows = text if layer in (1, 2) else everyone
            x = x.index_add(0, rows, m.mlp(layer, x[rows]))
        return m.logits(x)

    compare(tiny_llava, llava_batch, SkipModules([1], [1, 2], groups=[Group.IMAGE]), oracle)


def test_skip_modules_hiding_pictures(tiny_llava, llava_batch):
    def oracle(m, x, kind, n):
        everyone, text = torch.arange(len(x)), which(kind, "text", "system")
        for layer in range(m.depth):
            rows, keys = text if layer in (0, 1) else everyone, text if layer == 1 else everyone
            x = x.index_add(0, rows, m.attention(layer, x, rows, keys))
            rows = text if layer == 1 else everyone
            x = x.index_add(0, rows, m.mlp(layer, x[rows]))
        return m.logits(x)

    compare(tiny_llava, llava_batch, SkipModules([0], [1], groups=[Group.IMAGE], hide=[1]), oracle)


def test_hiding_needs_a_group():
    with pytest.raises(ValueError, match="say whom to hide"):
        SkipModules(hide=[1])


@pytest.mark.parametrize("positions", ["keep", "reindex"])
def test_drop_tokens(positions, tiny_llama, text_batch):
    def oracle(m, x, kind, n):
        kept = torch.tensor([i for i in range(len(x)) if i >= n or (i + 1) % 3 != 2])
        rest, everyone = x[kept], torch.arange(len(kept))
        at = kept if positions == "keep" else everyone
        for layer in range(m.depth):
            rest = rest + m.attention(layer, rest, everyone, everyone, at)
            rest = rest + m.mlp(layer, rest)
        return m.logits(x.index_copy(0, kept, rest))

    compare(tiny_llama, text_batch, DropTokens(wide, positions=positions), oracle)


@pytest.mark.parametrize(("entry", "exit_"), [(2, None), (1, 3)])
def test_enter_late(entry, exit_, tiny_llava, llava_batch):
    def oracle(m, x, kind, n):
        for layer in range(m.depth):
            inside = layer >= entry and (exit_ is None or layer < exit_)
            rows = torch.arange(len(x)) if inside else which(kind, "text", "system")
            x = x.index_add(0, rows, m.attention(layer, x, rows, rows))
            x = x.index_add(0, rows, m.mlp(layer, x[rows]))
        return m.logits(x)

    compare(tiny_llava, llava_batch, EnterLate(entry, exit_), oracle)


@torch.no_grad()
def test_fastv_by_all_tokens_within_a_window():
    """What a token receives is averaged over those that can see it: where layers slide, the tokens of one window."""
    model, inputs = llava_mistral(), vision_batch("left")
    with sparing.apply(model, FastV(1, 0.5, rank_by="all", chunk=4)) as run:
        model(**inputs)
    eager = llava_mistral("eager")
    (weights, *_) = eager(**inputs, output_attentions=True).attentions
    index, valid = torch.arange(weights.shape[-1]), inputs["attention_mask"].bool()
    window = eager.config.text_config.sliding_window
    later = (index[:, None] > index) & (index[:, None] - index < window) & valid[:, :, None]
    received = (weights.mean(1) * later).sum(1) / later.sum(1).clamp(min=1)
    for row, ids in enumerate(inputs["input_ids"]):
        image = (ids == IMAGE).nonzero().flatten().tolist()
        best = sorted(image, key=lambda i: -received[row, i])[: math.floor(len(image) / 2 + 0.5)]
        assert run.ledger.read(1)[row, image].nonzero().flatten().tolist() == sorted(image.index(i) for i in best)


@pytest.mark.parametrize("prefix", ["update", "freeze", 1])
def test_vica(prefix, tiny_llava, llava_batch):
    """v0 is never updated; text reads it in layers 0 and 2 through one softmax over system, picture and text."""

    def oracle(m, x, kind, n):
        words, everyone = which(kind, "text", "system"), torch.arange(len(x))
        for layer in range(m.depth):
            frozen = prefix == "freeze" or (prefix == 1 and layer > 1)
            rows = which(kind, "text") if frozen else words
            keys = everyone if layer in (0, 2) else words
            x = x.index_add(0, rows, m.attention(layer, x, rows, keys))
            x = x.index_add(0, words, m.mlp(layer, x[words]))
        return m.logits(x)

    compare(tiny_llava, llava_batch, ViCA([0, 2], prefix=prefix), oracle)


@pytest.mark.parametrize("rank_by", ["last", "all"])
@pytest.mark.parametrize(("layer", "keep"), [(2, 0.5), (1, 0.37)])
def test_fast_v(rank_by, layer, keep, tiny_llava, llava_batch):
    def oracle(m, x, kind, n):
        alive, image = torch.arange(len(x)), which(kind, "image")
        for i in range(m.depth):
            if i == layer - 1:
                prompt = torch.arange(n)
                given = m.probabilities(i, x, prompt, prompt).mean(0)
                got = {j: (given[n - 1, j] if rank_by == "last" else given[j + 1 :, j].mean()) for j in image.tolist()}
                best = sorted(got, key=lambda j: -got[j])[: math.floor(keep * len(image) + 0.5)]
            if i == layer:
                alive = torch.tensor([j for j in range(len(x)) if kind[j] != "image" or j in best])
            x = x.index_add(0, alive, m.attention(i, x, alive, alive))
            x = x.index_add(0, alive, m.mlp(i, x[alive]))
        return m.logits(x)

    compare(tiny_llava, llava_batch, FastV(layer, keep, rank_by=rank_by, chunk=7), oracle)


def test_pyramid_drop(tiny_llava, llava_batch):
    """Ranked on the stage layer's input with its own projections; gone in that same layer."""

    def oracle(m, x, kind, n):
        alive, left = torch.arange(len(x)), which(kind, "image").tolist()
        count, share = len(left), 1.0
        for layer in range(m.depth):
            if layer in (1, 2, 3):
                share *= {1: 0.7, 2: 0.5, 3: 0.5}[layer]
                before = alive[alive < n]
                given = m.probabilities(layer, x, torch.tensor([n - 1]), before).mean(0)[0]
                order = sorted(left, key=lambda j: -given[before.tolist().index(j)])
                left = order[: math.floor(count * share)]
                alive = torch.tensor([j for j in range(len(x)) if kind[j] != "image" or j in left])
            x = x.index_add(0, alive, m.attention(layer, x, alive, alive))
            x = x.index_add(0, alive, m.mlp(layer, x[alive]))
        return m.logits(x)

    compare(tiny_llava, llava_batch, PyramidDrop([1, 2, 3], [0.7, 0.5, 0.5]), oracle)


@pytest.mark.parametrize(
    "pruned", [FastV(2, 0.5), FastV(2, 0.5, rank_by="all", chunk=5), PyramidDrop([1, 3], [0.7, 0.5])], ids=repr
)
def test_pruning_under_vica(pruned, tiny_llava, llava_batch):
    """Ranked by attention in reading layers, among what is read there; the picture is frozen, and less of it is read afterwards."""
    reading = (0, 1, 3)

    def oracle(m, x, kind, n):
        words, left = which(kind, "text", "system"), which(kind, "image").tolist()
        count, share, best = len(left), 1.0, left
        for layer in range(m.depth):
            alive = torch.tensor([j for j in range(n) if kind[j] != "image" or j in left])
            given = torch.zeros(n, n)
            given[:, alive] = m.probabilities(layer, x, torch.arange(n), alive).mean(0)
            if isinstance(pruned, PyramidDrop) and layer in (1, 3):
                share *= {1: 0.7, 3: 0.5}[layer]
                left = best = sorted(left, key=lambda j: -given[n - 1, j])[: math.floor(count * share)]
            if isinstance(pruned, FastV) and layer == 1:
                by = {j: given[n - 1, j] if pruned.rank_by == "last" else given[j + 1 :, j].mean() for j in left}
                best = sorted(left, key=lambda j: -by[j])[: math.floor(0.5 * count + 0.5)]
            keys = torch.tensor([j for j in range(len(x)) if kind[j] != "image" or (layer in reading and j in left)])
            x = x.index_add(0, words, m.attention(layer, x, words, keys))
            x = x.index_add(0, words, m.mlp(layer, x[words]))
            left = best
        return m.logits(x)

    compare(tiny_llava, llava_batch, ViCA(reading) & pruned, oracle)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_wait_k(k, tiny_llama, text_batch):
    """The token that predicts a token of target segment i sees the source segments before k + i."""
    pattern = [0, 1, 1, 2, 3, 3, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10]

    def oracle(m, x, kind, n):
        half, everyone = n // 2, torch.arange(len(x))

        def may(query, key):
            if query >= n:  # decoded: all of the source has come
                return True
            if query < half:
                return key < half
            predicted = min(query + 1, n - 1) - half
            return key >= half or pattern[key] < k + pattern[predicted]

        for layer in range(m.depth):
            x = x + m.attention(layer, x, everyone, everyone, may=may)
            x = x + m.mlp(layer, x)
        return m.logits(x)

    compare(tiny_llama, text_batch, WaitKMask(k), oracle, regroup=streamed)


def test_wait_k_in_order_of_arrival(tiny_llama, text_batch):
    """Where targets come between source tokens, the source still sees no target."""

    def oracle(m, x, kind, n):
        everyone = torch.arange(len(x))
        target = [place % 3 == 2 for place in range(n)]

        def may(query, key):
            if query >= n or key >= n:
                return True
            if not target[query]:
                return not target[key]
            following = query + 3 if query + 3 < n else query
            return target[key] or key * 2 // 9 < 1 + following // 3

        for layer in range(m.depth):
            x = x + m.attention(layer, x, everyone, everyone, may=may)
            x = x + m.mlp(layer, x)
        return m.logits(x)

    compare(tiny_llama, text_batch, WaitKMask(1), oracle, regroup=interleaved)
