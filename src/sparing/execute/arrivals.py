"""The map of the tokens that a pass brings, and whether its mask fits what came before."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparing.anatomy import Anatomy
from sparing.execute.cache import RunState
from sparing.tokens import Group, TokenMap


def new_tokens(anatomy: Anatomy, inputs: Mapping[str, Any], embeds: Tensor, state: RunState | None) -> TokenMap:
    """The map of a pass's new tokens; `inputs` is what the model was called with.

    While decoding one token a row, everything is text and nothing is looked up.
    """
    b, t = embeds.shape[:2]
    past = 0 if state is None else state.tokens.length
    mask = inputs.get("attention_mask")
    all_open = mask is None or state is None or _continues(mask, state, t)
    if state is not None and t == 1:
        group = torch.full((b, 1), int(Group.TEXT), dtype=torch.int8, device=embeds.device)
        present = frozenset({Group.TEXT})
        if mask is not None and not all_open:
            group, present = torch.where(mask[:, -1:] == 0, int(Group.PAD), group), frozenset()
        segment = _no_segment(state, group)
        return TokenMap(group, inputs["position_ids"], ((),) * b, segment, _ids_of(inputs, b, t), present)
    ids = _ids_of(inputs, b, t)
    tokens = anatomy.read_tokens({**inputs, "input_ids": ids, "inputs_embeds": embeds})
    if state is None:
        return tokens
    images = tuple(tuple(s._replace(start=s.start + past, stop=s.stop + past) for s in row) for row in tokens.images)
    group, present = tokens.group, tokens.present
    if Group.SYSTEM in present and any(state.tokens.images):
        # What precedes a row's later pictures is text.
        again = torch.tensor([bool(row) for row in state.tokens.images], device=group.device).unsqueeze(1)
        group, present = torch.where(again & (group == Group.SYSTEM), int(Group.TEXT), group), frozenset()
    return dataclasses.replace(tokens, group=group, images=images, segment=_no_segment(state, group), present=present)


def _continues(mask: Tensor, state: RunState, new: int) -> bool:
    """Whether a mask leaves all new tokens open; waits for the device once.

    Raises:
        ValueError: a mask that is not 2-D, of another length, or with other padding before the new tokens than at first.
    """
    past, valid = state.tokens.length, state.tokens.valid
    if mask.ndim != 2 and not state.idle:
        raise ValueError(
            f"attention_mask has {mask.ndim} dimensions: pass the 2-D padding mask, and express the rest with LayerPlan.sees"
        )
    if state.idle:
        return mask.ndim != 2 or bool(mask[:, -new:].all())
    if mask.shape[-1] != past + new:
        raise ValueError(
            f"attention_mask covers {mask.shape[-1]} tokens: give one entry for each of the {past} so far and the {new} new ones"
        )
    unchanged = ((mask[:, :past] != 0) == valid).all()
    same, open_ = torch.stack([unchanged, mask[:, past:].all()]).tolist()
    if not same:
        raise ValueError(
            "attention_mask hides or shows other cached tokens than before: keep its first part as it was, and say what "
            "can no longer be read with LayerPlan.read"
        )
    return bool(open_)


def _ids_of(inputs: Mapping[str, Any], batch: int, length: int) -> Tensor | None:
    """The ids of a pass, if the model was called with them."""
    ids = inputs.get("input_ids")
    return ids if ids is not None and ids.shape == (batch, length) else None


def _no_segment(state: RunState, group: Tensor) -> Tensor | None:
    """Decoded tokens belong to no segment (-1), where the prompt has segments."""
    segment = state.tokens.segment
    return None if segment is None else torch.full_like(group, -1, dtype=segment.dtype)
