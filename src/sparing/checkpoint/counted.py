"""What a checkpoint costs by counting, for its card: nothing is timed, and saving a large model stays quick."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparing.anatomy import Anatomy, anatomy_of
from sparing.execute import apply, run_of
from sparing.plan import Cost, Policy
from sparing.tokens import Group, ImageSpan, TokenMap

TEXT, GRID = 64, (8, 8)
"""The reference prompt: 64 tokens of text; with a vision encoder 16 of them, a picture of 8 x 8 tokens, the other 48."""
BUDGET = {"cpu": 10**11, "cuda": 10**14}
"""Operations that counting may run: some seconds of one core, less than a second of a GPU."""
APART = ("lm_head", "encoder")
"""Parts that the reference prompt leaves out: no plan changes them."""


@dataclasses.dataclass(frozen=True)
class Counted:
    """What is known of a model and its policies without a measurement.

    Attributes:
        parameters: of the model.
        policy_parameters: of its policies.
        prompt: what the costs are of, in words.
        cost: with the policies; `None` where it was not counted.
        dense: of the same passes with everything computed.
        reason: why it was not counted.
    """

    parameters: int
    policy_parameters: int
    prompt: str = ""
    cost: Cost | None = None
    dense: Cost | None = None
    reason: str = ""


def count(model: nn.Module, policies: Sequence[Policy]) -> Counted:
    """Count what the policies' plan costs, on one short forward pass of the decoder at most.

    A policy that learned, or that chooses tokens by what they hold, decides by what it reads, so random tokens say nothing of it:
    it is counted on the latest prompt that the model ran under it, if there was one.
    """
    sizes = Counted(
        model.num_parameters(),  # type: ignore[operator]
        sum(p.numel() for policy in policies if isinstance(policy, nn.Module) for p in policy.parameters()),
    )
    if not policies:
        return sizes
    run = run_of(model)
    learned = [type(p).__name__ for p in policies if isinstance(p, nn.Module) or p.selections()]
    try:
        if learned:
            if run is None or not run.ledger.passes:
                why = f"{learned[0]} decides by what it reads: call the model under it first, then its latest prompt is counted"
                return dataclasses.replace(sizes, reason=why)
            first = run.ledger.passes[0]
            decoded = run.ledger.length - first.length
            prompt = f"the latest prompt before saving ({first.batch} x {first.length} tokens, {decoded} decoded)"
            return dataclasses.replace(sizes, prompt=prompt, cost=run.ledger.cost(), dense=run.ledger.dense_cost())
        if (why := _too_much(model)) is not None:
            return dataclasses.replace(sizes, reason=why)
        tokens, prompt = _reference(model)
        found = _run(model, policies, tokens)
        return dataclasses.replace(sizes, prompt=prompt, cost=found[0], dense=found[1])
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        # A card is no reason to lose a save.
        return dataclasses.replace(sizes, reason=" ".join(str(error).split())[:200] or type(error).__name__)


def _too_much(model: nn.Module) -> str | None:
    """Why one short pass of the model would hold up its saving."""
    decoder = anatomy_of(model).decoder
    parameters = list(decoder.layers.parameters())
    kinds = {p.device.type for p in parameters}
    if len(kinds) != 1 or not kinds <= BUDGET.keys() or getattr(model, "hf_device_map", None):
        return "its weights are not on one device"
    if any(module.training for module in (decoder, *decoder.layers)):
        return "it was saved in training mode"
    needed = 2 * (TEXT + GRID[0] * GRID[1]) * sum(p.numel() for p in parameters)
    if needed > BUDGET[kinds.pop()]:
        return "a pass of a model of this size would hold up its saving"
    return None


def _reference(model: nn.Module) -> tuple[TokenMap, str]:
    device = _embeddings(anatomy_of(model)).device
    if anatomy_of(model).vision_encoder is None:
        group = torch.full((1, TEXT), int(Group.TEXT), device=device)
        return TokenMap.from_groups(group), f"one prompt of {TEXT} tokens of text"
    before, picture = TEXT // 4, GRID[0] * GRID[1]
    group = torch.full((1, TEXT + picture), int(Group.TEXT), device=device)
    group[:, :before], group[:, before : before + picture] = int(Group.SYSTEM), int(Group.IMAGE)
    images = [[ImageSpan(before, before + picture, GRID)]]
    return TokenMap.from_groups(group, images=images), (
        f"one prompt of {before} tokens of text, a picture of {picture} tokens and {TEXT - before} tokens of text"
    )


@torch.no_grad()
def _run(model: nn.Module, policies: Sequence[Policy], tokens: TokenMap) -> tuple[Cost, Cost]:
    """The prompt and one decoded token through the decoder alone, under the policies."""
    decoder, run = anatomy_of(model).decoder, run_of(model)
    table = _embeddings(anatomy_of(model))
    # A generator of its own: a save is no reason for other draws later.
    ids = torch.randint(len(table), (1, tokens.length + 1), generator=torch.Generator().manual_seed(0))
    embeds = decoder.embed_tokens(ids.to(table.device))

    def through() -> None:
        out = decoder(inputs_embeds=embeds[:, :-1], use_cache=True)
        decoder(inputs_embeds=embeds[:, -1:], past_key_values=out.past_key_values, use_cache=True)

    if run is not None:
        with run.trial(tokens) as ledger_of:
            through()
            return ledger_of().cost(), ledger_of().dense_cost()
    with apply(model, *policies, tokens=tokens, force=True) as fresh:
        through()
        return fresh.ledger.cost(), fresh.ledger.dense_cost()


def _embeddings(family: Anatomy) -> Tensor:
    return family.decoder.embed_tokens.weight


def table(counted: Counted) -> list[tuple[str, ...]]:
    """Rows of the card: part, and operations with their share of dense, prefill and decode apart."""
    if counted.cost is None or counted.dense is None:
        return []
    leave = APART if counted.prompt.startswith("one prompt") else ()
    phases = [(getattr(counted.cost, name), getattr(counted.dense, name)) for name in ("prefill", "decode")]
    rows, sums = [], [[0, 0], [0, 0]]
    for part in phases[0][0].flops:
        found = [(ours.flops[part], dense.flops[part]) for ours, dense in phases]
        if part in leave or not any(map(any, found)):
            continue
        for total, (ours, dense) in zip(sums, found, strict=True):
            total[0] += ours
            total[1] += dense
        rows.append((part.replace("_", " "), *(cell for pair in found for cell in _cells(*pair))))
    return [*rows, ("all", *(cell for ours, dense in sums for cell in _cells(ours, dense)))]


def _cells(ours: int, dense: int) -> tuple[str, str]:
    return f"{ours:.3g}", f"{ours / dense:.1%}" if dense else "–"


def of_bytes(counted: Counted) -> tuple[int, Any]:
    """Bytes of keys and values at the end, and their share of dense."""
    assert counted.cost is not None
    assert counted.dense is not None
    return counted.cost.kv_bytes, f"{counted.cost.kv_bytes / counted.dense.kv_bytes:.1%}"
