"""Design test 5 for the rivals of ViCA: each in plain PyTorch, row by row, against both executors, prompt and decode."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import models
from oracles import compare, which
from sparing.policies import DART, CDPruner, DivPrune, DropTokens, SparseVLM, VisionZip, VisPruner, VScan
from sparing.tokens import Group


def pictures(kind):
    """The indices of each picture of a row."""
    image = which(kind, "image").tolist()
    return [image[i : i + models.PATCHES] for i in range(0, len(image), models.PATCHES)]


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
        count = nearest(0.4, len(image))
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


class Seen:
    """What the stock encoder did with the pictures of the batch: eager maps, hidden states, keys; found by their tokens."""

    def __init__(self, model):
        self.model = model
        tower = copy.deepcopy(model.model.vision_tower)
        tower.set_attn_implementation("eager")
        pixels = models.llava_batch("left")["pixel_values"]
        with torch.no_grad():
            out = tower(pixels, output_attentions=True, output_hidden_states=True)
            self.tokens = model.get_image_features(pixels).pooler_output
        self.maps = [layer.mean(1)[:, 0, 1:] for layer in out.attentions]
        self.states = out.hidden_states[-2][:, 1:]
        layer = tower.encoder.layers[0] if hasattr(tower, "encoder") else tower.vision_model.encoder.layers[0]
        keys = layer.self_attn.k_proj(layer.layer_norm1(out.hidden_states[0]))
        self.keys = keys.unflatten(-1, (2, -1)).mean(-2)[:, 1:].detach()

    def number(self, tokens):
        return min(range(len(self.tokens)), key=lambda p: (self.tokens[p] - tokens).abs().max())

    def project(self, states):
        with torch.no_grad():
            return self.model.model.multi_modal_projector(states[None])[0]


def cosine(a, b):
    return F.cosine_similarity(a, b, dim=0).item()


def best(scores, count, among=None):
    return sorted(range(len(scores)) if among is None else among, key=lambda i: -scores[i])[:count]


def by_picture(choose):
    """An oracle that lets `choose(x[picture], picture)` say which of its tokens stay, and what they are."""

    def oracle(m, x, kind, n):
        x, alive = x.clone(), which(kind, "text", "system").tolist()
        for picture in pictures(kind):
            kept, states = choose(x[picture], x, kind)
            x[picture] = states
            alive += [picture[i] for i in kept]
        return rest(m, x, torch.tensor(sorted(alive)))

    return oracle


def test_vision_zip(tiny_llava, llava_batch):
    """Dominant tokens by class attention; the others' states are added to evenly spaced targets, and projected."""
    seen = Seen(tiny_llava)

    def choose(tokens, x, kind):
        p = seen.number(tokens)
        dominant = best(seen.maps[0][p], 5 - 2)
        left = [i for i in range(9) if i not in dominant]
        targets = left[:: len(left) // 2][:2]
        went = {t: [] for t in targets}
        for i in left:
            if i not in targets:
                went[max(targets, key=lambda t: cosine(seen.keys[p, i], seen.keys[p, t]))].append(i)
        states = seen.states[p].clone()
        for t, own in went.items():
            states[t] += states[own].mean(0) if own else 0
        tokens[targets] = seen.project(states)[targets]
        return dominant + targets, tokens

    compare(tiny_llava, llava_batch, VisionZip(0.6, contextual=0.4), by_picture(choose))


def test_vis_pruner(tiny_llava, llava_batch, monkeypatch):
    """Important tokens by class attention; of the others, the first set's best matches go, at most so many a round."""
    seen = Seen(tiny_llava)
    monkeypatch.setattr("sparing.policies.vis_pruner.AT_ONCE", 1)

    def choose(tokens, x, kind):
        p = seen.number(tokens)
        order = best(seen.maps[0][p], 9)
        important, left = order[:2], order[2:]
        while len(left) > 3:
            first, second = left[::2], left[1::2]
            match = [max(cosine(seen.states[p, i], seen.states[p, j]) for j in second) for i in first]
            left = [first[i] for i in best(match, len(first))[1:]] + second
        return important + left, tokens

    compare(tiny_llava, llava_batch, VisPruner(0.6, important=0.4), by_picture(choose))


def test_cd_pruner(tiny_llava, llava_batch):
    """Each step takes the token with which the determinant of the chosen kernel is largest."""

    def choose(tokens, x, kind):
        # The text of the prompt: what is decoded comes later.
        text = x[[i for i in which(kind, "text").tolist() if i < len(x) - 3]]
        unit = F.normalize(tokens, dim=-1)
        match = (unit @ F.normalize(text, dim=-1).T).mean(1)
        relevance = (match - match.min() + 1e-6) / (match.max() - match.min())
        kernel = (relevance[:, None] * (unit @ unit.T) * relevance).double()
        chosen = []
        while len(chosen) < 5:
            left = [i for i in range(9) if i not in chosen]
            chosen.append(max(left, key=lambda i: kernel[[*chosen, i]][:, [*chosen, i]].det()))
        return chosen, tokens

    compare(tiny_llava, llava_batch, CDPruner(0.5), by_picture(choose))


def test_v_scan(tiny_llava, llava_batch):
    """Best of each window in one layer, then the best of all in another; means of what is most alike; one stage in the decoder."""
    seen = Seen(tiny_llava)

    def choose(tokens, x, kind):
        p = seen.number(tokens)
        windows = [[0, 1, 3, 4], [2, 5], [6, 7], [8]]
        firsts = [best(seen.maps[1][p], 1, w)[0] for w in windows]
        kept = best(seen.maps[1][p], 3, firsts)
        kept += best(seen.maps[0][p], 3, [i for i in range(9) if i not in kept])
        went = {k: [k] for k in kept}
        for i in range(9):
            if i not in kept:
                went[max(kept, key=lambda k: cosine(tokens[i], tokens[k]))].append(i)
        new = tokens.clone()
        for k, own in went.items():
            new[k] = tokens[own].mean(0)
        return kept, new

    def oracle(m, x, kind, n):
        x, left = x.clone(), []
        for picture in pictures(kind):
            kept, x[picture] = choose(x[picture], x, kind)
            left += [picture[i] for i in kept]
        alive = torch.tensor(sorted(left + which(kind, "text", "system").tolist()))
        for layer in range(m.depth):
            if layer == 1:
                before = alive[alive < n]
                given = m.probabilities(layer, x, torch.tensor([n - 1]), before).mean(0)[0]
                score = dict(zip(before.tolist(), given.tolist(), strict=True))
                left = best(score, math.floor(0.6 * len(left) + 0.5), left)
                alive = torch.tensor(sorted(left + which(kind, "text", "system").tolist()))
            x = x.index_add(0, alive, m.attention(layer, x, alive, alive))
            x = x.index_add(0, alive, m.mlp(layer, x[alive]))
        return m.logits(x)

    compare(tiny_llava, llava_batch, VScan(0.7, 1, 0.6, window=2, local_layer=-1), oracle)
