"""`Rows`: which token rows a branch computes, and how to take them out of the residual stream and put them back."""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.plan.layer_plan import Mask

BLOCK, MOST_BLOCKS = 64, 8
"""Attention under a mask is asked in blocks of about this many tokens, but in no more blocks than this."""


class Rows:
    """A choice of tokens in a `[b t]` batch. "Packed" is how the chosen rows lie in matrix products.

    There are four kinds, from cheap to general: every token (a view), none, the same contiguous stretch in every row of the
    batch (a slice), and scattered tokens (gathered). Where each batch row has the same number of chosen tokens the packed form
    is `[b m ...]`; otherwise it is `[n ...]` without padding, and only attention sees a padded form.

    Args:
        mask: `[b t]`, or `True`/`False` for all.
        batch: number of rows in the batch.
        length: tokens a row.
        device: where the indices shall live.
        capacity: a promised bound on the tokens a row; with it nothing waits for the device.
        blocked: whether to find out what `blocks` needs.
    """

    def __init__(
        self,
        mask: Mask,
        batch: int,
        length: int,
        device: torch.device,
        capacity: int | None = None,
        *,
        blocked: bool = False,
    ) -> None:
        self.batch, self.length = batch, length
        self.every = mask is True
        self.none = mask is False
        self.stretch: slice | None = None
        self.uniform = True
        self.width = 0 if self.none else length
        self._flat: Tensor | None = None
        self._slot: Tensor | None = None
        self._empty: Tensor | None = None
        self._cuts: list[int] = []
        if isinstance(mask, Tensor):
            self._index(mask, capacity, blocked)
        else:
            self.index = torch.arange(self.width, device=device).expand(batch, self.width)

    def _index(self, mask: Tensor, capacity: int | None, blocked: bool) -> None:
        """Find the chosen tokens; one transfer to the host (none with a capacity)."""
        b, t = self.batch, self.length
        if mask.shape[0] != b:
            mask = mask.expand(b, t)
        if capacity is not None:
            if mask.device.type == "cpu":
                _check_promise(mask, capacity)
            self.width = min(capacity, t)
            if self.width == 0:
                self.none, self.index = True, mask.new_zeros((b, 0), dtype=torch.long)
                return
            # A stable sort puts the chosen ones first, in order; what is beyond them is an empty slot.
            order = torch.argsort(~mask, dim=1, stable=True)[:, : self.width]
            chosen = mask.gather(1, order)
            self.index = torch.where(chosen, order, -1)
            self.uniform = True
            self._flat = (order + torch.arange(b, device=mask.device)[:, None] * t).flatten()
            self._empty = ~chosen
            return
        # How many tokens lie before the first, the last, and (for `blocks`) what follows each part of the widest choice.
        rank = mask.cumsum(1)
        count = rank[:, -1]
        bounds = [torch.ones_like(count), count]
        parts = min(t // BLOCK, MOST_BLOCKS) if blocked else 1
        if parts > 1:
            bounds += [(count.max() * part // parts + 1).expand(b) for part in range(1, parts)]
        before = (rank.unsqueeze(1) < torch.stack(bounds, dim=1).unsqueeze(2)).sum(2)
        counts, firsts, lasts, *cuts = torch.cat([count.unsqueeze(1), before], dim=1).T.tolist()
        self.width = max(counts)
        self._cuts = [max(cut) for cut in cuts]
        self.uniform = min(counts) == self.width
        if self.width == 0:
            self.none, self.index = True, mask.new_zeros((b, 0), dtype=torch.long)
            return
        if self.uniform and self.width == t:
            self.every, self.index = True, torch.arange(t, device=mask.device).expand(b, t)
            return
        if self.uniform and all(f == firsts[0] and e - f + 1 == self.width for f, e in zip(firsts, lasts, strict=True)):
            self.stretch = slice(firsts[0], lasts[0] + 1)
            self.index = torch.arange(firsts[0], lasts[0] + 1, device=mask.device).expand(b, self.width)
            return
        self._flat = mask.flatten().nonzero_static(size=sum(counts)).flatten()
        if self.uniform:
            self.index = (self._flat % t).view(b, self.width)
            return
        inside = torch.arange(self.width, device=mask.device) < count[:, None]
        self._slot = inside.flatten().nonzero_static(size=sum(counts)).flatten()
        self.index = torch.full((b * self.width,), -1, device=mask.device)
        self.index[self._slot] = self._flat % t
        self.index = self.index.view(b, self.width)

    def blocks(self) -> list[tuple[int, int, int]]:
        """Stretches `(first, stop, reach)` of the padded slots; no token of one lies at or after `reach` in its row.

        A masked attention kernel computes whole rows of scores; asking in blocks leaves out keys that are all in the future.
        """
        parts = len(self._cuts) + 1
        stops = [self.width * part // parts for part in range(1, parts + 1)]
        reaches = [*self._cuts, self.length]
        blocks: list[tuple[int, int, int]] = []
        first = 0
        for i, (stop, reach) in enumerate(zip(stops, reaches, strict=True)):
            # A block pays for its call only if it has some queries, and the ones after it reach clearly further.
            if i + 1 < parts and (stop - first < BLOCK // 2 or reaches[i + 1] - reach < BLOCK // 2):
                continue
            blocks.append((first, stop, reach))
            first = stop
        return blocks

    @property
    def ragged(self) -> bool:
        """Whether some slot of the padded form may be empty."""
        return not self.uniform or self._empty is not None

    def take(self, x: Tensor) -> Tensor:
        """`[b t ...]` -> packed rows."""
        if self.every:
            return x
        if self.stretch is not None:
            return x[:, self.stretch]
        if x.shape[0] != self.batch:
            x = x.expand(self.batch, *x.shape[1:])
        rows = x.reshape(self.batch * self.length, *x.shape[2:]).index_select(0, self._require_flat())
        return rows.view(self.batch, self.width, *x.shape[2:]) if self.uniform else rows

    def pad(self, packed: Tensor) -> Tensor:
        """Packed -> `[b m ...]`, zeros in empty slots."""
        if self._slot is None:
            return packed
        out = packed.new_zeros(self.batch * self.width, *packed.shape[1:])
        return out.index_copy(0, self._slot, packed).view(self.batch, self.width, *packed.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """`[b m ...]` -> packed."""
        if self._slot is None:
            return padded
        return padded.reshape(self.batch * self.width, *padded.shape[2:]).index_select(0, self._slot)

    def put(self, x: Tensor, packed: Tensor, *, in_place: bool) -> Tensor:
        """`x` `[b t d]` with these rows replaced. In place only where the caller owns `x` and no gradient needs its old value."""
        if self.stretch is not None:
            if in_place:
                x[:, self.stretch] = packed
                return x
            return torch.cat([x[:, : self.stretch.start], packed, x[:, self.stretch.stop :]], dim=1)
        flat, rows = x.reshape(-1, x.shape[-1]), packed.reshape(-1, x.shape[-1])
        if in_place:
            flat.index_copy_(0, self._require_flat(), rows)
            return x
        return flat.index_copy(0, self._require_flat(), rows).view_as(x)

    def _require_flat(self) -> Tensor:
        assert self._flat is not None
        return self._flat


def _check_promise(mask: Tensor, capacity: int) -> None:
    """Raise `ValueError` if a row has more chosen tokens than promised. Only on the host: elsewhere looking means waiting."""
    most = max(mask.numpy().sum(1), default=0)
    if most > capacity:
        raise ValueError(f"LayerPlan.capacity promises at most {capacity} tokens a row, but a row has {most}")


class Residual:
    """The residual stream `[b t d]`, written to only when someone else looks.

    Consecutive branches often work on the same rows (the text of a prompt whose picture is frozen). Those rows stay packed from one
    branch to the next, and go back into the stream when other rows, or the whole, are asked for.

    Args:
        x: `[b t d]`, the prompt's embeddings; never written to.
        in_place: whether later streams may be written to (they may not where gradients need their old values).
    """

    def __init__(self, x: Tensor, *, in_place: bool) -> None:
        self._whole, self._owned, self._in_place = x, False, in_place
        self._rows: Rows | None = None
        self._packed: Tensor | None = None
        self._changed = False

    def whole(self) -> Tensor:
        """The stream as it stands."""
        if self._changed and self._rows is not None and self._packed is not None:
            self._whole = self._rows.put(self._whole, self._packed, in_place=self._owned and self._in_place)
            self._owned, self._changed = True, False
        return self._whole

    def keep(self) -> Tensor:
        """The stream as it stands, never to be written to: the next change makes a new one."""
        whole = self.whole()
        self._owned = False
        return whole

    def replace(self, x: Tensor) -> None:
        """Put another stream in its place."""
        self._whole, self._owned, self._changed = x, True, False
        self._rows = self._packed = None

    def take(self, rows: Rows) -> Tensor:
        """Packed rows of the stream."""
        if rows is not self._rows or self._packed is None:
            self._packed = rows.take(self.whole())
            self._rows = rows
        return self._packed

    def add(self, rows: Rows, branch: Tensor) -> None:
        """Add a branch, packed, to its rows."""
        if rows._empty is not None:
            branch = branch.masked_fill(rows._empty.unsqueeze(-1), 0)
        packed = self.take(rows) + branch
        if rows.every:
            # The sum is the new stream; holding the old one as well would cost memory.
            self.replace(packed)
        else:
            self._packed, self._changed = packed, True
