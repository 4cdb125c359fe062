"""Best words found in bf16 and proven in float32, where the hardware multiplies bf16 faster. The result is that of float32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparing.lens.nearest import Best, rows

AT_ONCE = 128
"""States whose candidates are compared again at a time."""
ROUNDING = 2.0**-8
"""By how much of itself a product in bf16 may be off, from rounding it."""
SUMS = 1e-5
"""By how much cosines in float32 may be off, from the order of summing."""

Words = Callable[[], Iterator[tuple[Tensor, Tensor]]]
"""Gives all words, a part at a time: ids `[w]` and unit vectors `[w d]`."""


def pays(device: torch.device) -> bool:
    """Whether a device multiplies bf16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Not "can": AVX2 and AVX-512 without these instructions can, many times slower than float32.
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in asked)


def candidates(k: int) -> int:
    """Words that are compared again to find the `k` best."""
    return 2 * k + 12


def find(best: Best, unit: Tensor, words: Words, embed: Callable[[Tensor], Tensor]) -> Tensor:
    """The best words by cosine, and which states they are not proven for.

    The candidates of a state are its nearest by products in bf16; they are compared again in float32. By Cauchy and Schwarz no
    product in bf16 of `u` and `w` is off by more than `|u - u'| + |u'| |w - w'|` and the rounding of the result, so no word beyond the
    candidates can have a larger cosine than the last candidate's product and that sum. A state is proven if its `k`-th best is above.

    Args:
        best: is filled; nothing was added to it before.
        unit: unit vectors of the states, float32 `[m d]`.
        words: all words.
        embed: unit vectors of some words by their ids.

    Returns:
        `[m]`, true where another word may be among the best, or may tie with the last of them.
    """
    k = best.ids.shape[1]
    coarse = Best(len(unit), candidates(k), unit.device, lowest_first=False)
    half, off = torch.empty_like(unit, dtype=torch.bfloat16), unit.new_empty(len(unit))
    for at in rows(len(unit)):
        half[at] = unit[at]
        off[at] = torch.linalg.vector_norm(unit[at] - half[at], dim=1)
    furthest = unit.new_zeros(())
    with _summed_in_full(unit.device):
        for ids, vectors in words():
            rounded = vectors.to(torch.bfloat16)
            furthest = torch.maximum(furthest, torch.linalg.vector_norm(vectors - rounded, dim=1).max())
            for at in rows(len(unit)):
                coarse.add(at, half[at] @ rounded.T, ids)
    for at in rows(len(unit), AT_ONCE):
        # Ascending ids, which a stable sort leaves so where scores tie.
        ids = coarse.ids[at].sort(1).values
        again = torch.bmm(embed(ids.flatten()).view(*ids.shape, -1), unit[at].unsqueeze(-1)).squeeze(-1)
        scores, order = again.sort(dim=1, descending=True, stable=True)
        best.scores[at], best.ids[at] = scores[:, :k], ids.gather(1, order)[:, :k]
    last = coarse.scores[:, -1]
    return best.scores[:, -1] <= last + ROUNDING * last.abs() + off + (1 + off) * furthest + SUMS


@contextlib.contextmanager
def _summed_in_full(device: torch.device) -> Iterator[None]:
    """No rounding of partial sums, which cuBLAS may do by default."""
    if device.type != "cuda":
        yield
        return
    settings, name = torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"
    before = getattr(settings, name), getattr(settings, f"{name}_split_k", None)
    setattr(settings, name, False)
    try:
        yield
    finally:
        setattr(settings, name, before[0] if before[1] is None else before)
