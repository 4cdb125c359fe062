"""`Beginnings`: what prompts about held pictures begin with, system prompt and pictures, read once and gone on from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparing.anatomy import Anatomy
from sparing.execute.cache import PlannedCache, RaggedLayer

KEPT = 2
"""So many beginnings are kept, the latest ones."""


class Split(NamedTuple):
    """A batch whose rows begin alike.

    Attributes:
        head: `[1 h]`, ids of the beginning, up to the last image token.
        rest: ids behind it, by row; at least one each.
        padding: an id of the batch's padding; 0 where it has none.
    """

    head: Tensor
    rest: list[Tensor]
    padding: int


class Beginnings:
    """Beginnings that were read, each a cache of one row that prompts fork; under a causal policy nothing behind changes it."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[bytes, tuple[int, ...]], PlannedCache] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that are kept beside the pictures'."""
        layers = [layer for cache in self._kept.values() for layer in cache.layers]
        own = [x for layer in layers if isinstance(layer, RaggedLayer) for x in (layer.keys, layer.values)]
        return sum(x.numel() * x.element_size() for x in own if x is not None)

    def take(self, split: Split, shown: tuple[int, ...], read: Callable[[Tensor], PlannedCache]) -> PlannedCache:
        """The cache of a beginning; `read` makes it from the ids `[1 h]` where it is not kept."""
        key = split.head.cpu().numpy().tobytes(), shown
        if key not in self._kept:
            self._kept[key] = read(split.head)
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return self._kept[key]


def split(anatomy: Anatomy, inputs: Mapping[str, Tensor], shown: Sequence[tuple[int, ...]]) -> Split | str:
    """Cut a batch behind its last pictures; or why it cannot be cut. Padding on any side is left out. Waits for the device.

    Args:
        anatomy: the model's.
        inputs: `input_ids` and, where there is padding, `attention_mask`, both `[b t]`.
        shown: which pictures each row shows.
    """
    device, ids = inputs["input_ids"].device, inputs["input_ids"].cpu()
    mask = inputs["attention_mask"].cpu().bool() if "attention_mask" in inputs else torch.ones_like(ids).bool()
    is_image = anatomy.is_image_token(ids)
    assert isinstance(is_image, Tensor)
    if len(set(shown)) > 1:
        return "its rows show different pictures"
    if not bool((is_image & mask).any(1).all()):
        return "a row of it has no picture"
    rows = [row[kept] for row, kept in zip(ids, mask, strict=True)]
    stop = int(is_image[0][mask[0]].nonzero()[-1]) + 1
    head = rows[0][:stop]
    if not all(torch.equal(row[:stop], head) for row in rows):
        return "its rows differ in front of their last picture"
    # What comes later brings no pictures.
    if any(bool(is_image[r][mask[r]][stop:].any()) for r in range(len(rows))):
        return "its rows show different pictures"
    if any(len(row) == stop for row in rows):
        return "a row of it ends with its picture"
    if len({len(row) for row in rows}) > 1 and any(layer.window is not None for layer in anatomy.shape().layers):
        return "its questions differ in length, and padding between pictures and question would count in the model's windows"
    padding = ids[~mask]
    return Split(head[None].to(device), [row[stop:].to(device) for row in rows], int(padding[0]) if len(padding) else 0)


def behind(cut: Split, cache: PlannedCache) -> dict[str, Any]:
    """What `model(...)` and `model.generate(...)` go on with: later ids, padded on the left, and a fork of the beginning's cache.

    Positions count on from the beginning's, padding left out, as `generate` does; on all axes alike where there are several.
    """
    if cache.state.shift is not None:
        raise ValueError("a policy moves the positions of this prompt's tokens: call the model on the whole prompt")
    b, width, device = len(cut.rest), max(map(len, cut.rest)), cut.head.device
    ids = torch.full((b, width), cut.padding, dtype=cut.head.dtype, device=device)
    open_ = torch.zeros(b, width, dtype=torch.long, device=device)
    for r, row in enumerate(cut.rest):
        ids[r, width - len(row) :], open_[r, width - len(row) :] = row, 1
    before = cache.state.tokens.position_ids
    # Of all axes: a picture's positions may go further on one than its last token does.
    positions = (before.max() + open_.cumsum(1)) * open_
    return {
        "input_ids": ids,
        "attention_mask": torch.cat([open_.new_ones(b, cut.head.shape[1]), open_], dim=1),
        "position_ids": positions.expand(*before.shape[:-2], -1, -1),
        "past_key_values": cache.fork(torch.zeros(b, dtype=torch.long, device=device)),
    }
