"""Density-peak clustering of tokens: how SparseVLM folds what it removes into a few tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def density_peaks(states: Float[Tensor, "n d"], clusters: int) -> tuple[Int[Tensor, " c"], Int[Tensor, " n"]]:
    """Find cluster centres, and give every token to the nearest.

    A token's density is `exp(-mean of the squared distances to its nearest tokens)`, itself and as many as there are clusters in
    all; distances are divided by `sqrt(d)`. Centres are the tokens with the largest product of density and distance to the nearest
    denser token (the largest distance of all, for the densest). Both are compared as logarithms, since the density of tokens far
    apart is too small for a float. Equals are ordered by place.

    Args:
        states: the tokens.
        clusters: how many clusters, at most `n`.

    Returns:
        Each centre's place, and the number of the cluster that each token belongs to; a centre belongs to its own.

    Paper: DPC-KNN (Du, Ding and Jia 2016) after Rodriguez and Laio (2014), as token reduction took it over.
    """
    distance = torch.cdist(states.float(), states.float(), compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance / states.shape[1] ** 0.5
    log_density = -distance.topk(clusters, dim=1, largest=False).values.square().mean(1)
    place = torch.arange(len(states), device=states.device)
    equal = log_density[None] == log_density[:, None]
    denser = (log_density[None] > log_density[:, None]) | (equal & (place < place[:, None]))
    apart = distance.masked_fill(~denser, float("inf")).amin(1).clamp(max=distance.max())
    centres = (apart.log() + log_density).argsort(descending=True, stable=True)[:clusters]
    member = distance[:, centres].argmin(1)
    member[centres] = torch.arange(clusters, device=states.device)
    return centres, member
