"""The `Ledger`: layer x module x token -> ran, skipped, read or gone. Every cost is counted from it."""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparing.plan.cost import PARTS, Cost, ModelShape, PhaseCost
from sparing.plan.layer_plan import Mask, Sees, both


class TokenState(enum.IntEnum):
    """What became of one token in one module of one layer."""

    GONE = 0  # neither computed nor read here or in any later layer (padding too)
    SKIPPED = 1  # not computed here; its residual goes on
    READ = 2  # not computed here, but its key and value are (attention only)
    RAN = 3


@dataclasses.dataclass(eq=False)
class LayerRecord:
    """What one layer did in one forward pass. Masks are `[b t]` over the pass's new tokens, or `True`/`False` for all."""

    attend: Mask
    feed: Mask
    read: Mask
    sees: Sees | None = None
    spent: int = 0
    freed: Bool[Tensor, "b past"] | None = None
    given: Mask = False
    """Tokens whose keys and values came with the prompt (a `VisionPrefix` holds them): read, but not computed or stored here."""


@dataclasses.dataclass(eq=False)
class PassRecord:
    """One forward pass: its first original index, its new tokens, and a record a layer."""

    start: int
    valid: Mask
    batch: int
    length: int
    logit_rows: int
    pictures: int
    layers: list[LayerRecord]
    prefill: bool
    reorder: Int[Tensor, " b"] | None = None
    """Rows of the pass before that these rows continue (beams); `None` for the same ones."""
    encoder: int = 0
    """Operations of the vision encoder on this pass's pictures."""

    def history(self, columns: Tensor) -> Tensor:
        """What was gathered of earlier passes `[b T]`, cut to where this one starts and in its order of rows."""
        columns = columns[:, : self.start]
        return columns if self.reorder is None else columns.index_select(0, self.reorder.cpu())


class Ledger:
    """What was decided, and what it cost. One schema for every method.

    The executors record references to the plans' own masks and wait for nothing; counting happens when asked. Tables have the
    rows and tokens that the cache has now: reordered by beams, without what was cropped. Costs are of all that was computed.

    Attributes:
        shape: the model's sizes.
        passes: one record a forward pass: the prompt's, then the decoded tokens'.
        ablation: set by ablations; such a run is never a speed-up.
    """

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self.passes: list[PassRecord] = []
        self.ablation = False
        self._reorder: Tensor | None = None
        self._cropped: int | None = None
        self._inherited = 0

    def fork(self) -> Ledger:
        """A ledger of its own that goes on from here. What has run so far stays in its tables; this one alone counts its cost."""
        forked = copy.copy(self)
        forked.passes, forked._inherited = list(self.passes), len(self.passes)
        return forked

    def begin(self, record: PassRecord) -> None:
        """Open the record of another pass."""
        record.reorder, self._reorder, self._cropped = self._reorder, None, None
        self.passes.append(record)

    def reorder(self, rows: Int[Tensor, " b"]) -> None:
        """Note that the rows of the next pass continue these rows (beams)."""
        self._reorder = rows if self._reorder is None else self._reorder[rows]

    def crop(self, length: int) -> None:
        """Note that the tokens from `length` on are forgotten."""
        self._cropped = length

    @property
    def length(self) -> int:
        """Tokens a row so far, padding included."""
        if self._cropped is not None:
            return self._cropped
        return self.passes[-1].start + self.passes[-1].length if self.passes else 0

    def attend(self, layer: int) -> Bool[Tensor, "b T"]:
        """Which tokens ran the attention branch of `layer`."""
        return self._column(layer, lambda r: r.attend)

    def feed(self, layer: int) -> Bool[Tensor, "b T"]:
        """Which tokens ran the MLP branch of `layer`."""
        return self._column(layer, lambda r: r.feed)

    def read(self, layer: int) -> Bool[Tensor, "b T"]:
        """Whose keys and values `layer` computed (later freed or not)."""
        return self._column(layer, lambda r: r.read)

    def kept(self, layer: int) -> Bool[Tensor, "b T"]:
        """Whose keys and values can still be read in `layer` at the end of the run."""
        self._require_passes()
        return self._walk(layer)[1]

    def states(self) -> Int[Tensor, "layers 2 b T"]:
        """The whole table of `TokenState`: layer x (attention, MLP) x row x token."""
        self._require_passes()
        (b, n), depth = self.attend(0).shape, self.shape.depth
        table = torch.full((depth, 2, b, n), int(TokenState.GONE), dtype=torch.int8)
        # Downward through the layers: whoever is used later is merely skipped here, not gone.
        later = torch.zeros(b, n, dtype=torch.bool)
        for layer in range(depth - 1, -1, -1):
            attend, feed, read = self.attend(layer), self.feed(layer), self.read(layer)
            later = later | attend | feed | read
            table[layer, :, later] = int(TokenState.SKIPPED)
            table[layer, 0][read] = int(TokenState.READ)
            table[layer, 0][attend] = int(TokenState.RAN)
            table[layer, 1][feed] = int(TokenState.RAN)
        return table

    def cost(self) -> Cost:
        """Count the cost of every recorded pass; of those before a `fork` only the keys and values that are left."""
        self._require_passes()
        phases = {True: _zero(), False: _zero()}
        kv = 0
        # Layers with the same decisions share their masks, so they are counted once.
        counted: dict[tuple[int | None, ...], tuple[list[int], int]] = {}
        for layer, shape in enumerate(self.shape.layers):
            marks = (
                shape.window,
                *(
                    id(m)
                    for p in self.passes
                    for r in (p.layers[layer],)
                    for m in (r.attend, r.read, r.freed, r.sees, r.given)
                ),
            )
            if marks not in counted:
                counts, kept = self._walk(layer)
                counted[marks] = counts, int((kept & ~self._column(layer, lambda r: r.given)).sum())
            pairs, slots = counted[marks]
            kv += slots * shape.kv_width
            for p, seen in list(zip(self.passes, pairs, strict=True))[self._inherited :]:
                flops, rows = phases[p.prefill]
                record = p.layers[layer]
                attend, feed, read = (_count(m, p) for m in (record.attend, record.feed, record.read))
                read -= _count(both(record.read, record.given), p)
                rows["attend"] += attend
                rows["feed"] += feed
                rows["read"] += read
                flops["attention_projections"] += attend * shape.query_flops
                flops["attention_kv"] += read * shape.kv_flops
                flops["attention_scores"] += seen * shape.pair_flops
                flops["mlp"] += feed * shape.mlp_flops
                flops["router"] += record.spent
        for p in self.passes[self._inherited :]:
            flops = phases[p.prefill][0]
            flops["lm_head"] += p.logit_rows * 2 * self.shape.hidden * self.shape.vocabulary
            flops["encoder"] += p.encoder
        prefill, decode = (PhaseCost(*phases[k]) for k in (True, False))
        return Cost(prefill, decode, kv * self.shape.element_bytes, self.ablation)

    def dense_cost(self) -> Cost:
        """What the same passes would have cost with every token computed and read everywhere."""
        full = copy.copy(self)
        full.passes = [
            dataclasses.replace(p, layers=[LayerRecord(True, True, True) for _ in p.layers]) for p in self.passes
        ]
        full.ablation = False
        return full.cost()

    def _walk(self, layer: int) -> tuple[list[int], Bool[Tensor, "b T"]]:
        """Query-key pairs of each pass (attending queries, keys readable to them), and the keys kept at the end."""
        pairs: list[int] = []
        window = self.shape.layers[layer].window
        kept = torch.zeros(self.passes[0].batch, 0, dtype=torch.bool)
        for p in self.passes:
            record = p.layers[layer]
            kept = p.history(kept)
            if record.freed is not None:
                kept = kept & ~record.freed.cpu()
            kept = torch.cat([kept, _fill(record.read, p)], dim=1)
            if record.attend is False:
                pairs.append(0)
                continue
            attend = _fill(record.attend, p)
            if record.sees is None:
                visible = kept.long().cumsum(1)
                if window is not None and window < visible.shape[1]:
                    visible = torch.cat([visible[:, :window], visible[:, window:] - visible[:, :-window]], dim=1)
                pairs.append(int((visible[:, p.start :] * attend).sum()))
            else:
                query, key = torch.arange(p.start, p.start + p.length), torch.arange(kept.shape[1])
                may = record.sees(query[None, :, None], key[None, None, :]).cpu() & kept[:, None]
                may = may & (key[None, None] <= query[None, :, None])
                if window is not None:
                    may = may & (query[None, :, None] - key[None, None] < window)
                pairs.append(int((may & attend[:, :, None]).sum()))
        kept = self._now(kept)
        if window is not None:
            # What the next query cannot see no later one can.
            kept[:, : max(kept.shape[1] - window + 1, 0)] = False
        return pairs, kept

    def _column(self, layer: int, part: Callable[[LayerRecord], Mask]) -> Bool[Tensor, "b T"]:
        self._require_passes()
        column = torch.zeros(self.passes[0].batch, 0, dtype=torch.bool)
        for p in self.passes:
            column = torch.cat([p.history(column), _fill(part(p.layers[layer]), p)], dim=1)
        return self._now(column)

    def _now(self, columns: Tensor) -> Tensor:
        """Columns `[b T]` as they are after the last pass."""
        columns = columns[:, : self.length]
        return columns if self._reorder is None else columns.index_select(0, self._reorder.cpu())

    def _require_passes(self) -> None:
        if not self.passes:
            raise ValueError("nothing has run yet: call the model inside `with sparing.apply(...)` first")


def _zero() -> tuple[dict[str, int], dict[str, int]]:
    return dict.fromkeys(PARTS, 0), dict.fromkeys(("attend", "feed", "read"), 0)


def _fill(mask: Mask, p: PassRecord) -> Bool[Tensor, "b t"]:
    """A record's mask as a tensor on the host, padding taken out."""
    out = (
        mask.cpu().expand(p.batch, p.length).clone()
        if isinstance(mask, Tensor)
        else torch.full((p.batch, p.length), mask)
    )
    return out & p.valid.cpu() if isinstance(p.valid, Tensor) else out


def _count(mask: Mask, p: PassRecord) -> int:
    if mask is False:
        return 0
    if mask is True:
        return int(p.valid.sum()) if isinstance(p.valid, Tensor) else p.batch * p.length
    # A mask may have one row for the whole batch.
    return int((mask & p.valid).expand(p.batch, p.length).sum())
