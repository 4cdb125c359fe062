"""What a method's schedule costs on pictures, and the setting of a method that costs what another does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sparing.plan import ModelShape, Policy

STEPS = 40
SMALLEST = 2.0**-20

Made = TypeVar("Made", bound=Policy)


def visual_share(policy: Policy, shape: ModelShape, *, pictures: int = 576, text: int = 64) -> float:
    """Share of the decoder's operations on picture tokens that a policy's schedule leaves, at prefill.

    Operations on picture tokens are their projections, their MLPs, and all pairs in which a picture token asks or is asked (but for
    text in front of it). The encoder, which all methods run, and rankings are not counted; the ledger of a run counts them, and whole
    numbers of tokens: of a hundred, half a token is 5% of what a budget of 10% pays for. Nor are newline tokens, which methods before
    the first layer leave alone, and the token that every stage of `SparseVLM` recycles at least.

    Args:
        policy: one that knows its schedule (`Policy.picture_shares`).
        shape: the model's sizes (`run.shape`).
        pictures: picture tokens of the prompt.
        text: tokens of the prompt behind them.

    Raises:
        ValueError: only a run tells what the policy leaves.
    """
    computed, read = policy.picture_shares(shape.depth), policy.picture_reads(shape.depth)
    if computed is None or read is None:
        raise ValueError(
            f"only a run tells what {policy!r} leaves of a picture: compare the costs in its ledger, or choose a method that keeps "
            "a fixed share"
        )

    def flops(asks: float, asked: float, layer: int) -> float:
        sizes, asking, keys = shape.layers[layer], asks * pictures, asked * pictures
        pairs = asking * keys / 2 + keys * text
        return asking * (sizes.query_flops + sizes.mlp_flops) + keys * sizes.kv_flops + pairs * sizes.pair_flops

    layers = range(shape.depth)
    return sum(flops(computed[i], read[i], i) for i in layers) / sum(flops(1.0, 1.0, i) for i in layers)


def at_share(
    make: Callable[[float], Made], share: float, shape: ModelShape, *, pictures: int = 576, text: int = 64
) -> Made:
    """The policy of a family that leaves a wanted share of the operations on picture tokens (`visual_share`).

    Args:
        make: the policy for a share of tokens to keep: `DivPrune`, `lambda keep: FastV(2, keep)`, `lambda keep: PyramidDrop(stages,
            keep)`. More tokens must cost more.
        share: the wanted share of operations.
        shape: the model's sizes.
        pictures: picture tokens of the prompt.
        text: tokens of the prompt behind them.

    Returns:
        The one with the largest `keep` that costs no more.

    Raises:
        ValueError: the share is not above 0 and at most 1, only a run tells what the policy leaves, or it costs more than that with
            hardly any token left (the layers before its first stage).
    """
    if not 0 < share <= 1:
        raise ValueError(f"at_share(share={share}): the share of operations lies above 0 and at most at 1")

    def costs(keep: float) -> float:
        return visual_share(make(keep), shape, pictures=pictures, text=text)

    low, high = SMALLEST, 1.0
    if costs(high) <= share:
        return make(high)
    if costs(low) > share:
        raise ValueError(
            f"{make(low)!r} still costs {costs(low):.3f} of the operations on picture tokens, more than {share:g}: drop at an earlier "
            "layer, or compare at a larger share"
        )
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if costs(middle) <= share else (low, middle)
    return make(low)
