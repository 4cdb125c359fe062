"""Design test 5 for the rivals of ViCA: each in plain PyTorch, row by row, against both executors, prompt and decode."""

import math

import pytest
import torch
import torch.nn.functional as F

from oracles import compare, which
from sparing.policies import DART, DivPrune, DropTokens, SparseVLM
from sparing.tokens import Group


def pictures(kind):
    """The indices of each picture of a row: stretches of image tokens."""
    found = []
    for i, k in enumerate(kind):
        if k == "image":
            if i and kind[i - 1] == "image":
                found[-1].append(i)
            else:
                found.append([i])
    return found


def rest(m, x, alive):
    """All layers over the tokens that are left, from the first one on."""
    for layer in range(m.depth):
        x = x.index_add(0, alive, m.attention(layer, x, alive, alive))
        x = x.index_add(0, alive, m.mlp(layer, x[alive]))
    return m.logits(x)


def nearest(share, n):
    return max(1, math.floor(share * n + 0.5))


def test_div_prune(tiny_llava, llava_batch):
    """Greedily, the token whose distance to the nearest chosen one is largest."""

    def oracle(m, x, kind, n):
        alive = which(kind, "text", "system").tolist()
        for picture in pictures(kind):
            far = {(i, j): 1 - F.cosine_similarity(x[i], x[j], dim=0).item() for i in picture for j in picture}
            chosen = [max(picture, key=lambda i: min(far[i, j] for j in picture if j != i))]
            while len(chosen) < nearest(0.4, len(picture)):
                others = [i for i in picture if i not in chosen]
                chosen.append(max(others, key=lambda i: min(far[i, j] for j in chosen)))
            alive += chosen
        return rest(m, x, torch.tensor(sorted(alive)))

    compare(tiny_llava, llava_batch, DivPrune(0.4), oracle)


def test_uniform_drop(tiny_llava, llava_batch):
    """Each of c equal parts of a row's picture tokens keeps the one in its middle."""

    def oracle(m, x, kind, n):
        image = which(kind, "image").tolist()
        count = math.floor(0.4 * len(image))
        kept = {image[math.ceil((k + 0.5) * len(image) / count) - 1] for k in range(count)} if image else set()
        return rest(m, x, torch.tensor([i for i, k in enumerate(kind) if k != "image" or i in kept]))

    policy = DropTokens(groups=[Group.IMAGE], keep=0.4, choose="uniform")
    compare(tiny_llava, llava_batch, policy, oracle)


def test_dart(tiny_llava, llava_batch):
    """Pivots by the L1 norm of their keys in the layer before; each keeps what is least like it behind the final norm."""

    def keys(m, layer, x):
        k = m.project(layer, m.norm(x, f"layers.{layer}.input_layernorm"), "k", m.groups)
        return m.turn(k, torch.arange(len(x)))

    def oracle(m, x, kind, n):
        alive, image = torch.arange(len(x)), which(kind, "image").tolist()
        text = [i for i in which(kind, "text").tolist() if i < n]
        for layer in range(m.depth):
            if layer == 1:
                size = keys(m, 1, x).abs().sum((1, 2))
            if layer == 2 and image:
                budget = nearest(0.6, len(image))
                ours = sorted(image, key=lambda i: -size[i])[:2]
                pivots = ours + sorted(text, key=lambda i: -size[i])[:1]
                parts = [(budget - len(ours) + len(pivots) - 1 - p) // len(pivots) for p in range(len(pivots))]
                out, kept = m.norm(x, "norm"), list(ours)
                for pivot, part in zip(pivots, parts, strict=True):
                    left = [i for i in image if i not in kept]
                    kept += sorted(left, key=lambda i: F.cosine_similarity(out[pivot], out[i], dim=0).item())[:part]
                assert len(kept) == budget
                alive = torch.tensor([i for i, k in enumerate(kind) if k != "image" or i in kept])
            x = x.index_add(0, alive, m.attention(layer, x, alive, alive))
            x = x.index_add(0, alive, m.mlp(layer, x[alive]))
        return m.logits(x)

    compare(tiny_llava, llava_batch, DART(2, 0.6, image_pivots=2, text_pivots=1), oracle)


@pytest.mark.parametrize("paper", [False, True])
def test_sparse_vlm(paper, tiny_llava, llava_batch):
    """Raters by softmax(picture @ text); attention from them ranks; the best of the others become a few tokens."""

    def clusters(states, number):
        far = torch.tensor([[(a - b).norm().item() for b in states] for a in states]) / states.shape[1] ** 0.5
        density = [math.exp(-sum(v * v for v in sorted(row.tolist())[:number]) / number) for row in far]
        apart = [
            min([far[i, j].item() for j in range(len(far)) if density[j] > d] or [far.max().item()])
            for i, d in enumerate(density)
        ]
        centres = sorted(range(len(far)), key=lambda i: -apart[i] * density[i])[:number]
        return {c: [i for i in range(len(far)) if min(centres, key=lambda k: far[k, i]) == c] for c in centres}

    def oracle(m, x, kind, n):
        alive, image = list(range(len(x))), which(kind, "image").tolist()
        text = [i for i in which(kind, "text").tolist() if i < n]
        if image:
            match = (x[image] @ x[text].T).softmax(1).mean(0)
            raters = torch.tensor([i for i, value in zip(text, match, strict=True) if value > match.mean()])
        left = list(image)
        for layer in range(m.depth):
            rows = torch.tensor(alive)
            if layer in (0, 1) and image:
                prompt = [i for i in alive if i < n]
                given = m.probabilities(layer, x, raters, torch.tensor(prompt)).mean(0)[
                    :, [prompt.index(i) for i in left]
                ]
                score = dict(zip(left, given.mean(0).tolist(), strict=True))
            x = x.index_add(0, rows, m.attention(layer, x, rows, rows))
            x = x.index_add(0, rows, m.mlp(layer, x[rows]))
            if layer in (0, 1) and image:
                rank = torch.linalg.matrix_rank(given).item()
                count = (
                    len(left) - math.floor((len(left) - rank) * 0.8)
                    if paper
                    else math.floor((0.7, 0.4)[layer] * len(image) + 0.5)
                )
                order = sorted(left, key=lambda i: -score[i])
                gone = order[count:]
                merged = sorted(gone[: math.floor(len(gone) * 0.5) + 1])
                found = clusters(x[merged], math.floor(len(merged) * 0.3) + 1) if merged else {}
                fold = {c: x[[merged[i] for i in own]] for c, own in found.items()}
                for c, members in fold.items():
                    x[merged[c]] = members.sum(0) if paper else members.mean(0)
                left = sorted([*order[:count], *(merged[c] for c in found)])
                alive = [i for i in alive if kind[i] != "image" or i in left]
        return m.logits(x)

    how = {"recycle": 0.5, "clusters": 0.3, "merge": "sum" if paper else "mean", "adaptive": 0.8 if paper else None}
    compare(tiny_llava, llava_batch, SparseVLM([0, 1], [0.7, 0.4], **how), oracle)
