"""`Beginning`: what prompts about held pictures begin with, system prompt and pictures, read once and gone on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparing.anatomy import Anatomy
from sparing.execute.batches import COUNTS, PICTURES, ROWS
from sparing.execute.cache import PlannedCache, RaggedLayer
from sparing.execute.latest import Latest

KEPT = 2
"""So many beginnings are kept, the latest ones."""


class Split(NamedTuple):
    """A batch whose rows begin alike.

    Attributes:
        head: `[1 h]`, ids of the beginning, up to the last image token.
        rest: ids behind it, by row; at least one each.
        padding: an id of the batch's padding; 0 where it has none.
        name: the beginning's ids as bytes.
    """

    head: Tensor
    rest: list[Tensor]
    padding: int
    name: bytes


@dataclasses.dataclass(frozen=True)
class Beginning:
    """One that was read. Under policies that are causal and decide by layout alone nothing behind it changes it.

    Attributes:
        cache: of one row; prompts fork it, and nothing writes to it.
        deltas: what the model remembers of its pictures' positions (`Anatomy.remembers_positions`), if it does.
    """

    cache: PlannedCache
    deltas: Tensor | None


def tensors(beginnings: Latest[Beginning]) -> list[Tensor]:
    """All that is kept; keys and values of pictures among it, of which most are the prefix's own."""
    found: list[Tensor | None] = []
    for layer in (layer for kept in beginnings.values() for layer in kept.cache.layers):
        assert isinstance(layer, RaggedLayer)
        found += [layer.keys, layer.values, *(x for part in layer.given for x in (*part.keys, *part.values))]
    return [x for x in found if x is not None]


def split(anatomy: Anatomy, inputs: Mapping[str, Tensor], shown: Sequence[tuple[int, ...]]) -> Split | str:
    """Cut a batch behind its last pictures; or why it cannot be cut. Padding on either side is left out. Waits for the device.

    Args:
        anatomy: the model's.
        inputs: `input_ids` and, where there is padding, `attention_mask`, both `[b t]`.
        shown: which pictures each row shows.
    """
    brings = set(inputs) - {*ROWS, *COUNTS, *PICTURES, "token_type_ids"} | {"pixel_values"} & set(inputs)
    if brings:
        return f"it brings {sorted(brings)[0]}, which a beginning that was read before cannot heed"
    device, ids = inputs["input_ids"].device, inputs["input_ids"].cpu()
    mask = inputs["attention_mask"].cpu().bool() if "attention_mask" in inputs else torch.ones_like(ids).bool()
    if bool((mask.int().diff(dim=1).abs().sum(1) > 1).any()):
        return "its attention_mask has holes, and is not padding on one side"
    found: Any = anatomy.is_image_token(ids)
    is_image: Tensor = found & mask
    if not bool(is_image.any(1).all()):
        return "a row of it shows no picture"
    rows = [row[kept] for row, kept in zip(ids, mask, strict=True)]
    stop = int(is_image[0][mask[0]].nonzero()[-1]) + 1
    head = rows[0][:stop]
    if len(set(shown)) > 1 or bool((is_image.sum(1) != is_image[0].sum()).any()):
        return "its rows show different pictures"
    if not all(torch.equal(row[:stop], head) for row in rows):
        return "its rows differ in front of their last picture"
    if any(len(row) == stop for row in rows):
        return "a row of it ends with its picture"
    if len({len(row) for row in rows}) > 1 and any(layer.window is not None for layer in anatomy.shape().layers):
        return "its questions differ in length, and padding between pictures and question would count in the model's windows"
    padding = ids[~mask & ~found]
    rest = [row[stop:].to(device) for row in rows]
    return Split(head[None].to(device), rest, int(padding[0]) if len(padding) else 0, head.numpy().tobytes())


def behind(cut: Split, cache: PlannedCache, repeats: int, *, later: bool) -> dict[str, Any] | str:
    """What goes on from a beginning, padded between it and what is behind it; or why nothing can.

    Positions count on from the beginning's, padding left out, as `generate` does; on all axes alike where there are several.

    Args:
        cut: the batch.
        cache: the beginning's; each row gets a fork of it.
        repeats: rows of the fork for each row of the batch.
        later: whether ids and positions are those of what is behind alone, for `model(...)`; else of everything.
    """
    if cache.state.shift is not None:
        return "a policy moves the positions of its tokens"
    b, width, (_, h) = len(cut.rest), max(map(len, cut.rest)), cut.head.shape
    ids = cut.head.new_full((b, width), cut.padding)
    open_ = torch.zeros_like(ids)
    for r, row in enumerate(cut.rest):
        ids[r, width - len(row) :], open_[r, width - len(row) :] = row, 1
    before = cache.state.tokens.position_ids
    # Of all axes: a picture's positions may go further on one than its last token does.
    positions = ((before.max() + open_.cumsum(1)) * open_).expand(*before.shape[:-2], -1, -1)
    if not later:
        ids = torch.cat([cut.head.expand(b, h), ids], dim=1)
        positions = torch.cat([before.expand(*before.shape[:-2], b, h), positions], dim=-1)
    return {
        "input_ids": ids,
        "attention_mask": torch.cat([open_.new_ones(b, h), open_], dim=1),
        "position_ids": positions,
        "past_key_values": cache.fork(ids.new_zeros(b * repeats)),
    }
