"""Probe, precision and layer alignment: they find what was planted, and nothing where nothing was."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models import llava, llava_batch, text_batch
from sparing.lens import embedding_lens, layer_alignment, linear_probe, precision_at_k, record
from sparing.tokens import Group


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_precision_at_k_counts_true_words():
    reading = embedding_lens(llava(), llava_batch("left"), k=6)
    one = reading.ids[0, :, 2]
    assert not precision_at_k(reading, one, 2)[0].any()
    assert precision_at_k(reading, one, 3)[0].all()
    several = torch.stack([reading.ids[0, :, 5], reading.ids[1, :, 0], torch.full_like(one, -1)], 1)
    hits = precision_at_k(reading, several, 6)
    assert hits.shape == (5, 36, 3)
    assert hits[0, :, 0].all()
    assert hits[1, :, 1].all()
    assert not hits[..., 2].any()
    expected = [[int(one[i]) in reading.ids[level, i, :4] for i in range(36)] for level in range(5)]
    assert torch.equal(precision_at_k(reading, one, 4), torch.tensor(expected))
    with pytest.raises(ValueError, match="35 tokens, the reading about 36"):
        precision_at_k(reading, one[:35], 1)
    with pytest.raises(ValueError, match="1 <= k <= 6"):
        precision_at_k(reading, one, 7)


def test_the_probe_finds_what_is_linear_and_only_that():
    labels = torch.arange(600) % 4 + 10
    planted = F.one_hot(labels - 10, 4).float() @ draw(4, 30, seed=1) + 0.3 * draw(600, 30)
    # Scales and offsets of features do not matter.
    planted = planted * torch.logspace(-3, 3, 30) + 100 * draw(30, seed=2)
    found = linear_probe(planted[:400], labels[:400], planted[400:], labels[400:])
    assert found.accuracy > 0.97
    assert float(found) == found.accuracy == found.right.float().mean()
    assert found.classes == (10, 11, 12, 13)
    assert set(found.validation) > {found.penalty}
    again = linear_probe(planted[:400], labels[:400], planted[400:], labels[400:])
    assert torch.equal(found.right, again.right)
    noise = draw(600, 30, seed=3)
    assert linear_probe(noise[:400], labels[:400], noise[400:], labels[400:]).accuracy < 0.4
    # Labels that were never seen are never named.
    assert not linear_probe(planted[:400], labels[:400], planted[400:], labels[400:] + 50).right.any()


def test_the_probe_minimises_its_loss():
    states, labels = draw(80, 5), torch.arange(80) % 3
    from sparing.lens.probe import _fit

    weight, bias = (part.clone().requires_grad_() for part in _fit(states, labels, 3, 0.1))
    loss = F.cross_entropy(states @ weight.T + bias, labels) + 0.05 * weight.square().sum()
    for gradient in torch.autograd.grad(loss, [weight, bias]):
        assert gradient.abs().max() < 1e-3


def test_the_probe_refuses_bad_input():
    states, labels = draw(20, 5), torch.arange(20) % 2
    with pytest.raises(ValueError, match="a label a state"):
        linear_probe(states, labels[:4], states, labels)
    with pytest.raises(ValueError, match="of two labels or more"):
        linear_probe(states, torch.zeros(20, dtype=torch.long), states, labels)
    with pytest.raises(ValueError, match="ten training states"):
        linear_probe(states[:9], labels[:9], states, labels)
    with pytest.raises(ValueError, match="not finite"):
        linear_probe(states / 0, labels, states, labels)


def naive_measures(x, y, k):
    """Mutual kNN and debiased CKA as the papers define them, loop by loop, in float64."""
    x, y = (side.double().numpy() for side in (x, y))
    x, y = (side - side.mean(0) for side in (x, y))
    x, y = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (x, y))
    p = len(x)

    def nearest(side, i):
        cosine = side @ side[i]
        cosine[i] = -np.inf
        return set(np.argsort(-cosine)[:k].tolist())

    overlap = np.mean([len(nearest(x, i) & nearest(y, i)) / k for i in range(p)])

    def hsic(a, b):
        a, b, one = a - np.diag(np.diag(a)), b - np.diag(np.diag(b)), np.ones(p)
        sums = (one @ a @ one) * (one @ b @ one) / ((p - 1) * (p - 2))
        return (np.trace(a @ b) + sums - 2 / (p - 2) * one @ a @ b @ one) / (p * (p - 3))

    a, b = x @ x.T, y @ y.T
    return overlap, hsic(a, b) / np.sqrt(hsic(a, a) * hsic(b, b))


def test_alignment_is_what_the_papers_define():
    visual, text = draw(40, 12), draw(3, 40, 9, seed=1)
    text[1, :, :6] += 2 * visual[:, :6]
    found = layer_alignment(visual, text, k=5, pairings=20)
    for level in range(3):
        knn, cka = naive_measures(visual, text[level], 5)
        assert found.knn.scores[level].item() == pytest.approx(knn, abs=1e-5)
        assert found.cka.scores[level].item() == pytest.approx(cka, abs=1e-4)
    # The null is the same measure with the text's states in another order.
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    knn, cka = naive_measures(visual[order], text[1], 5)
    assert found.knn.null[0, 1].item() == pytest.approx(knn, abs=1e-5)
    assert found.cka.null[0, 1].item() == pytest.approx(cka, abs=1e-4)


def test_a_planted_alignment_is_found_at_its_level_and_none_where_there_is_none():
    visual = draw(120, 24)
    text = draw(6, 120, 40, seed=1)
    # Level 3 says the same in another basis, at other norms, around a common offset; level 4 says some of it.
    turn = draw(24, 40, seed=2)
    text[3] = (visual @ turn) * torch.rand(120, 1) * 50 + 7
    text[4] += 0.15 * visual @ turn
    visual = visual * torch.rand(120, 1).exp() + 3
    found = layer_alignment(visual, text)
    for measure in (found.knn, found.cka):
        assert measure.peak == 3
        assert measure.p[3] < 0.01
        assert measure.scores[3] > measure.scores[4] > measure.null_quantile(0.975)[4]
        assert (measure.p[:3] > 0.05).all()
        assert (measure.null_quantile(0.5)[3] < 0.2).all()
    assert found.knn.null_mean.mean() == pytest.approx(10 / 119, abs=0.01)
    assert found.cka.null_mean.abs().max() < 0.02, "debiased"
    assert (found.pairs, found.neighbours, found.level) == (120, 10, 0)
    nothing = layer_alignment(visual, draw(6, 120, 40, seed=5))
    assert nothing.knn.peak is None
    assert nothing.cka.peak is None


def test_pairs_and_groups():
    visual, twin = draw(50, 8), draw(1, 70, 8, seed=1)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(2))[:50]
    twin[0, order] = visual
    pairs = torch.stack([torch.arange(50), order], 1)
    found = layer_alignment(visual, twin, pairs, k=3, pairings=30)
    assert found.knn.scores.item() == pytest.approx(1)
    assert found.cka.scores.item() == pytest.approx(1, abs=1e-4)
    # Groups are means on both sides.
    groups = torch.arange(50) // 5
    grouped = layer_alignment(visual, twin, pairs, groups=groups, k=3, pairings=30)
    means = visual.unflatten(0, (10, 5)).mean(1)
    assert grouped.pairs == 10
    direct = layer_alignment(means, means[None], k=3, pairings=30)
    assert torch.allclose(grouped.knn.null, direct.knn.null, atol=1e-5)
    # Equal states: neighbours are shared out evenly, whichever stands first.
    words = draw(1, 5, 8, seed=3)[:, torch.arange(50) % 5]
    kinds = layer_alignment(F.one_hot(torch.arange(50) % 5).float(), words, k=3, pairings=30)
    assert kinds.knn.scores.item() == pytest.approx(3 / 9, abs=1e-5)


def test_recordings_of_pictures_and_text():
    model = llava()
    pictures, text = record(model, llava_batch("left"), where=Group.IMAGE), record(model, text_batch("left"))
    pairs = torch.arange(30)[:, None].expand(-1, 2)
    found = layer_alignment(pictures, text, pairs, level=2, k=4, pairings=10)
    assert found.level == 2
    assert found.knn.levels == text.levels
    same = layer_alignment(pictures.at(2), text.states, pairs, k=4, pairings=10)
    assert torch.equal(found.cka.scores, same.cka.scores)
    # In parts of one level each, the same.
    from sparing.lens import alignment

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alignment, "LEVELS_AT_ONCE", 1)
        parts = layer_alignment(pictures, text, pairs, level=2, k=4, pairings=10)
    assert torch.allclose(parts.knn.null, found.knn.null)
    assert torch.allclose(parts.cka.null, found.cka.null, atol=1e-6)
    with pytest.raises(ValueError, match="level 9 was not recorded"):
        layer_alignment(pictures, text, pairs, level=9)


def test_alignment_refuses_bad_input():
    visual, text = draw(20, 8), draw(2, 20, 8)
    with pytest.raises(ValueError, match="say by pairs"):
        layer_alignment(visual, text[:, :19])
    with pytest.raises(ValueError, match="beyond the 20 visual and 20 text"):
        layer_alignment(visual, text, torch.tensor([[0, 20]]))
    with pytest.raises(ValueError, match="k=19"):
        layer_alignment(visual, text, k=19)
    with pytest.raises(ValueError, match="3 groups for 20 pairs"):
        layer_alignment(visual, text, groups=torch.arange(3))
    with pytest.raises(ValueError, match="not finite"):
        layer_alignment(visual / 0, text)


def test_results_are_frozen():
    found = layer_alignment(draw(20, 8), draw(2, 20, 8), k=3, pairings=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.level = 3
