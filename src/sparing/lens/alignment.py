"""`layer_alignment`: which level of the text visual tokens are alike to, by neighbours and by kernels."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sparing.lens.record import Recording

LEVELS_AT_ONCE = 1 << 27
"""Elements of the text levels' `[p p]` matrices that are held at once."""
EQUAL = 1e-6
"""Cosines closer than this tie."""


@dataclasses.dataclass(frozen=True, eq=False)
class Alignment:
    """One measure of likeness at every level of the text, and what it is where the pairing is random.

    Attributes:
        levels: the text's levels.
        scores: the measure at each.
        null: the same under random pairings; each pairing is the same at all levels.
    """

    levels: tuple[int, ...]
    scores: Float[Tensor, " levels"]
    null: Float[Tensor, "pairings levels"]

    @property
    def null_mean(self) -> Float[Tensor, " levels"]:
        """The null's mean at each level."""
        return self.null.mean(0)

    def null_quantile(self, share: float) -> Float[Tensor, " levels"]:
        """A quantile of the null at each level."""
        return self.null.quantile(share, 0)

    @property
    def p(self) -> Float[Tensor, " levels"]:
        """One-sided p-value of each level, corrected for looking at all of them.

        The share of pairings, the given one counted, of which the best level is as far above the null's mean as this level is.
        """
        most = (self.null - self.null_mean).max(1).values
        above = (most[:, None] >= (self.scores - self.null_mean)[None]).sum(0)
        return (1 + above) / (1 + len(most))

    @property
    def peak(self) -> int | None:
        """The level that is furthest above its null; `None` where no level is above it at p < 0.05."""
        best = int((self.scores - self.null_mean).argmax())
        return self.levels[best] if self.p[best] < 0.05 else None


@dataclasses.dataclass(frozen=True, eq=False)
class LayerAlignment:
    """How much visual states of one level are like the text states of every level.

    Attributes:
        level: of the visual states.
        pairs: how many pairs were compared.
        neighbours: how many neighbours count in `knn`.
        knn: mean overlap of the nearest neighbours of both sides, 0 to 1.
        cka: debiased linear CKA, at most 1, around 0 for unrelated states.
    """

    level: int
    pairs: int
    neighbours: int
    knn: Alignment
    cka: Alignment


@torch.no_grad()
def layer_alignment(
    visual: Recording | Float[Tensor, "n d"],
    text: Recording | Float[Tensor, "levels m e"],
    pairs: Int[Tensor, "p 2"] | None = None,
    *,
    groups: Int[Tensor, " p"] | None = None,
    level: int = 0,
    k: int = 10,
    pairings: int = 200,
    seed: int = 0,
) -> LayerAlignment:
    """Whether visual tokens are like text states of one level more than of others: a predictor of the best entry layer.

    Pairs say which text token says the same as which image token: for example a patch that shows an object, and the word that names
    it in the same scene told as text. What is compared is how each side relates its own states to one another, never one side's
    states to the other's: so the sides may be of other models or widths. Norms are controlled for: each state has its side's mean
    at that level taken off and is brought to length one, so neither a state's norm nor what all states share decides.

    - `knn`: the mean share of a state's `k` nearest neighbours, by cosine, that both sides agree on. Where states tie (a word is the
      same wherever it stands, at level 0) the share expected if ties are broken at random. Chance is `k / (p - 1)`.
    - `cka`: linear CKA with the unbiased estimate of HSIC, which does not grow with the width of the states.

    The null draws the pairing anew, `pairings` times, the same at every level.

    Args:
        visual: a recording that holds the level asked for, or its states.
        text: a recording of the text twin, or its states at levels 0, 1, ...
        pairs: positions among the visual and the text tokens; by default both sides have the same number, in the same order.
        groups: a number for each pair; pairs of one group are averaged on both sides first (the mean over contexts of a word).
        level: of the visual states, if `visual` is a recording.
        k: neighbours of each state.
        pairings: random pairings of the null.
        seed: of the random pairings.

    Raises:
        ValueError: sides of different numbers without pairs, pairs that do not exist, too few of them for `k`, or states that are
            not finite.

    Paper: EmbedLens (2603.00510) says that alive tokens align with intermediate layers. Mutual kNN: Huh et al. (2405.07987);
        debiased CKA: Kornblith et al. (1905.00414) with the estimate of Song et al. (2012).
    Differs: the paper's measure was not released. Both measures, taking off the mean, the pairing by the caller and the null by
        pairings are our choice.
    """
    states = visual.at(level) if isinstance(visual, Recording) else visual
    levels, twins = (text.levels, text.states) if isinstance(text, Recording) else (tuple(range(len(text))), text)
    if pairs is None:
        if len(states) != twins.shape[1]:
            raise ValueError(
                f"{len(states)} visual and {twins.shape[1]} text states: say by pairs which belong together"
            )
        pairs = torch.arange(len(states))[:, None].expand(-1, 2)
    sizes = torch.tensor([len(states), twins.shape[1]])
    if bool(((pairs.cpu() < 0) | (pairs.cpu() >= sizes)).any()):
        raise ValueError(f"pairs name states beyond the {sizes[0]} visual and {sizes[1]} text ones that there are")
    left, right = pairs.T
    one = states[left.to(states.device)].float()[None]
    others = twins[:, right.to(twins.device)].float().to(one.device)
    if groups is not None:
        if len(groups) != len(pairs):
            raise ValueError(f"{len(groups)} groups for {len(pairs)} pairs: give each pair one")
        one, others = (_means(side, groups.to(side.device)) for side in (one, others))
    p = one.shape[1]
    if not 1 <= k < p - 1 or p < 4 or pairings < 1:
        raise ValueError(
            f"expected four pairs or more, 1 <= k < pairs - 1 and a pairing for the null, got {p} pairs, k={k}, pairings={pairings}"
        )
    if not bool(torch.isfinite(one).all()) or not bool(torch.isfinite(others).all()):
        raise ValueError("states that are not finite cannot be compared: load the model in float32 or bfloat16")
    one, others = _controlled(one), _controlled(others)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.arange(p), *(torch.randperm(p, generator=generator) for _ in range(pairings))]
    at_once = max(1, LEVELS_AT_ONCE // p**2)
    knn = _agreement(_neighbours(one[0], k), others, lambda x: _neighbours(x, k), orders, at_once) / (p * k)
    gram = _centred_gram(one[0])
    cka = _agreement(
        gram / gram.norm(), others, lambda x: F.normalize(_centred_gram(x).flatten(), dim=0), orders, at_once
    )
    return LayerAlignment(level, p, k, *(Alignment(levels, part[0], part[1:]) for part in (knn.cpu(), cka.cpu())))


def _means(states: Tensor, groups: Tensor) -> Tensor:
    """Means of each group's states, `[levels p d]` -> `[levels groups d]`."""
    _, at, counts = groups.unique(return_inverse=True, return_counts=True)
    sums = states.new_zeros(states.shape[0], len(counts), states.shape[2]).index_add_(1, at, states)
    return sums / counts[:, None]


def _controlled(states: Tensor) -> Tensor:
    """Each level without its mean, each state at length one."""
    return F.normalize(states - states.mean(1, keepdim=True), dim=-1, eps=1e-12)


def _neighbours(states: Tensor, k: int) -> Tensor:
    """The probability that each state is among another's `k` nearest, ties broken at random: `[p d]` -> `[p p]`."""
    cosine = (states @ states.T).fill_diagonal_(float("-inf"))
    last = cosine.topk(k, dim=1).values[:, -1:]
    nearer = cosine > last + EQUAL
    tied = (cosine - last).abs() <= EQUAL
    left = k - nearer.sum(1, keepdim=True)
    return nearer.float() + tied * (left / tied.sum(1, keepdim=True))


def _centred_gram(states: Tensor) -> Tensor:
    """The U-centred Gram matrix, whose products are unbiased estimates of HSIC."""
    p = len(states)
    gram = (states @ states.T).fill_diagonal_(0)
    sums = gram.sum(0)
    gram = gram - (sums[:, None] + sums[None]) / (p - 2) + sums.sum() / ((p - 1) * (p - 2))
    return gram.fill_diagonal_(0)


def _agreement(one: Tensor, others: Tensor, matrix_of, orders: list[Tensor], at_once: int) -> Tensor:
    """Products of a `[p p]` matrix, its rows and columns in each order, with those of every level: `[orders levels]`."""
    found = []
    for part in others.split(at_once):
        matrices = torch.stack([matrix_of(level).flatten() for level in part])
        reordered = ((one[order][:, order].flatten()) for order in (order.to(one.device) for order in orders))
        found.append(torch.stack([matrices @ each for each in reordered]))
    return torch.cat(found, 1)
