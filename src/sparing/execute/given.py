"""Keys and values that came with a prompt instead of being computed for it: one copy, read by many rows of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparing.execute.held import HeldPictures, Place
from sparing.execute.visibility import capped
from sparing.plan.layer_plan import Mask
from sparing.tokens import Group, ImageSpan, TokenMap

MOST_SCORES = 2**26
"""Attention beside given keys holds about this many scores at a time."""

FAR = -1e30
"""Added to a score that is not to count."""


@dataclasses.dataclass(frozen=True, eq=False)
class GivenRows:
    """Rows of a batch that read the same given keys at the same positions; none, where a row was given nothing.

    Attributes:
        rows: the rows; known on the host.
        index: `[n s]`, for each row the original index of each given key, -1 where it may not read it.
        holes: whether any is -1.
    """

    rows: tuple[int, ...]
    index: Int[Tensor, "n s"]
    holes: bool = False

    def of(self, x: Tensor) -> Tensor:
        """The group's rows of `x` `[b ...]`; `x` itself where that is all of them in order."""
        if self.rows == tuple(range(x.shape[0])):
            return x
        return x[torch.tensor(self.rows, device=x.device)]

    def without(self, freed: Tensor) -> GivenRows:
        """The same without the tokens that are marked in `freed` `[b T]`."""
        gone = self.of(freed).gather(1, self.index.clamp(min=0))
        return dataclasses.replace(self, index=torch.where(gone, -1, self.index), holes=True)

    def select(self, rows: Sequence[int]) -> GivenRows:
        """After the batch was reordered: its rows are now the old rows `rows`."""
        place = {row: i for i, row in enumerate(self.rows)}
        found = [(new, place[old]) for new, old in enumerate(rows) if old in place]
        at = torch.tensor([old for _, old in found], dtype=torch.long, device=self.index.device)
        return dataclasses.replace(self, rows=tuple(new for new, _ in found), index=self.index[at])


@dataclasses.dataclass(frozen=True, eq=False)
class GivenKeys:
    """What one layer was given for some rows. Keys and values are in parts (a part a picture), each there once for all rows.

    Attributes:
        where: which rows, and what each key is to them.
        keys: `[kv_heads s_i head_dim]`, after rotary embedding.
        values: `[kv_heads s_i head_dim]`.
    """

    where: GivenRows
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class Given:
    """The pictures of one prompt, held since before: where they are in it, and what each layer reads of them.

    Args:
        held: the pictures.
        tokens: the prompt.
        shown: for each row, which of the held pictures its image tokens are, in order.

    Raises:
        ValueError: the image tokens of a row are not those of its pictures.
    """

    def __init__(self, held: HeldPictures, tokens: TokenMap, shown: Sequence[Sequence[int]]) -> None:
        self.held, self._shown = held, tuple(map(tuple, shown))
        self.image = tokens.of(Group.IMAGE)
        device = tokens.group.device
        self._index: list[Tensor] = []
        self._host: list[Tensor] = []
        source = []
        for r, (row, pictures) in enumerate(zip(tokens.images, self._shown, strict=True)):
            _check_pictures(r, row, [span for picture in pictures for span in held.pictures[picture].spans])
            nowhere = torch.empty(0, dtype=torch.long)
            self._host.append(torch.cat([nowhere, *(torch.arange(span.start, span.stop) for span in row)]))
            self._index.append(self._host[-1].to(device))
            source += [torch.arange(held.pictures[p].start, held.pictures[p].stop) for p in pictures]
        self.reach = max((span.stop for row in tokens.images for span in row), default=0)
        """Behind the last given token."""
        length = tokens.length
        self._flat = torch.cat([index + r * length for r, index in enumerate(self._index)])
        self._source = torch.cat(source).to(device) if source else self._flat
        self._groups: list[tuple[GivenRows, tuple[Place, ...]]] = []
        self._reached: dict[int, Tensor] = {}

    def holds(self, layer: int) -> bool:
        """Whether keys and values of the pictures are held for a layer."""
        return layer in self.held.layers

    def passed(self, layer: int, here: Mask) -> None:
        """A layer is through; what the model adds behind it reaches the tokens that are in the next one, `here` `[b t]`."""
        if layer in self.held.additions and isinstance(here, Tensor):
            self._reached[layer] = here.flatten()[self._flat].unsqueeze(1)

    def fill(self, x: Tensor, layer: int) -> Tensor:
        """The residual stream `[b t d]` as it enters a layer, with the pictures' tokens put in their places."""
        states = self.held.state(layer)[self._source]
        if self._reached:
            states = self.held.state(0)[self._source]
            for before, features in self.held.additions.items():
                if before < layer:
                    added = states + features.to(states)[self._source]
                    states = torch.where(self._reached[before], added, states) if before in self._reached else added
        return x.reshape(-1, x.shape[-1]).index_copy(0, self._flat, states.to(x.dtype)).view_as(x)

    def others(self, masks: tuple[Mask, Mask, Mask], layer: int) -> Mask:
        """What a layer reads beside the given tokens; `masks` are the plan's read, attend and feed."""
        read = masks[0]
        if isinstance(read, Tensor) and not self.holds(layer) and bool((read & self.image).any()):
            raise ValueError(
                f"a policy reads pictures in layer {layer}, for which the prefix holds no keys: its `unread({layer})` says that "
                "no picture is read there"
            )
        return beside(self.image, read, masks)

    def settle(self, positions: Tensor) -> None:
        """Find which rows are alike, once the prompt's positions (`[b t]` or `[axes b t]`) are known."""
        alike: dict[tuple[Place, ...], list[int]] = {}
        positions = positions.cpu()
        for r, pictures in enumerate(self._shown):
            at = positions[..., r, :].index_select(-1, self._host[r])
            sizes = [self.held.pictures[p].stop - self.held.pictures[p].start for p in pictures]
            parts = at.split(sizes, dim=-1) if pictures else ()
            places = tuple(self.held.place(p, part) for p, part in zip(pictures, parts, strict=True))
            alike.setdefault(places, []).append(r)
        self._groups = [
            (GivenRows(tuple(rows), torch.stack([self._index[r] for r in rows])), places)
            for places, rows in alike.items()
        ]

    def keys(self, layer: int, read: Mask, memo: Callable[..., Any]) -> tuple[GivenKeys, ...]:
        """What a layer reads of the pictures: the held tensors themselves, of tokens that `read` asks for.

        Tokens that no row of a group reads (dropped ones) are left out, which copies the others once for the group; tokens that
        some of its rows read stay, hidden from the others.
        """
        if not self.holds(layer):
            return ()
        found = []
        for group in self._groups:
            where, places = group
            keys, values = self.held.keys(layer, places)
            if isinstance(read, Tensor) and places:
                where, kept = memo(("given", id(read), id(group)), lambda g=where: _chosen(g, read), read, group)
                if kept is not None and not len(kept):
                    keys = values = ()
                elif kept is not None:
                    keys, values = ((torch.cat(parts, dim=1).index_select(1, kept),) for parts in (keys, values))
            found.append(GivenKeys(where, keys, values))
        return tuple(found)


def beside(tokens: Tensor, among: Mask, masks: Sequence[Mask]) -> Tensor:
    """`[b t]`, who is `among` these but not one of `tokens`; where one of `masks` is equal, that very tensor.

    What layers derive from masks is shared by identity, so that an equal mask must not be another one.
    """
    others = ~tokens if among is True else ~tokens & among
    same = (m for m in masks if isinstance(m, Tensor) and m.shape == others.shape and torch.equal(m, others))
    return next(same, others)


def _check_pictures(row: int, found: Sequence[ImageSpan], held: Sequence[ImageSpan]) -> None:
    """Raise `ValueError` unless the image tokens of a row are laid out as those of its pictures."""

    def layout(spans: Sequence[ImageSpan]) -> list[Any]:
        return [span._replace(start=0, stop=span.stop - span.start) for span in spans]

    if layout(found) != layout(held):
        sizes = [[span.stop - span.start for span in spans] for spans in (found, held)]
        raise ValueError(
            f"row {row} has pictures of {sizes[0]} image tokens, the prefix holds {sizes[1]} for it: say which pictures a row "
            "shows (prefix.apply(pictures=...))"
        )


def _chosen(group: GivenRows, read: Tensor) -> tuple[GivenRows, Tensor | None]:
    """A group with the given tokens that are read: as it is, cut to the tokens kept by all its rows alike, or with holes."""
    rows = read if read.shape[0] == 1 else group.of(read)
    chosen = rows.expand(group.index.shape[0], -1).gather(1, group.index)
    every, alike = torch.stack([chosen.all(), (chosen == chosen[:1]).all()]).tolist()
    if every:
        return group, None
    if alike:
        kept = chosen[0].nonzero().flatten()
        return dataclasses.replace(group, index=group.index[:, kept]), kept
    return dataclasses.replace(group, index=torch.where(chosen, group.index, -1), holes=True), None


def attend_beside(
    query: Float[Tensor, "b heads q head_dim"],
    keys: Float[Tensor, "b kv_heads s head_dim"],
    values: Float[Tensor, "b kv_heads s head_dim"],
    given: Sequence[GivenKeys],
    *,
    may: Callable[[GivenRows], tuple[Tensor | None, Tensor | None]],
    scaling: float,
    cap: float | None,
) -> Float[Tensor, "b q heads*head_dim"]:
    """Softmax attention over given keys and a row's own, without bringing them together.

    All queries of a group meet the given keys in one product, so that shared keys are neither repeated for each row nor read once
    a row. What remains is exact: one softmax over both parts of the scores (in float32); on a CPU, where no gradient is asked for,
    each part by PyTorch's fused kernel, put together by their log-sum-exps.

    Args:
        query: rotated queries.
        keys: each row's own rotated keys.
        values: each row's own values.
        given: groups that cover every row of the batch.
        may: for a group, which of its given keys and own keys (in this order) each query may read `[n q s]`, and `[n q 1]`, whether
            there is any; `None` where every query reads every key.
        scaling: of the scores.
        cap: of the scores, where the family has one.

    Paper: Hydragen (2402.05099), section 3: attention over a shared prefix batched across sequences. Differs: the prefix need not
        come first (masks say who sees it), and parts are merged only where the fused kernel gives their log-sum-exp.
    """
    b, heads, q, dim = query.shape
    out = query.new_empty(b, q, heads * dim) if len(given) > 1 else None
    for part in given:
        mask, some = may(part.where)
        ours, own_keys, own_values = (part.where.of(x) for x in (query, keys, values))
        total = keys.shape[2] + sum(k.shape[1] for k in part.keys)
        size = max(MOST_SCORES // max(ours.shape[0] * heads * total, 1), 1)
        parts = range(0, q, size)
        compute = _merged if query.device.type == "cpu" and cap is None and not _needs_gradient(query, keys) else _joint
        masks = [None if mask is None else mask[:, at : at + size] for at in parts]
        blocks = [
            compute(ours[:, :, at : at + size], own_keys, own_values, part, hidden, scaling, cap)
            for at, hidden in zip(parts, masks, strict=True)
        ]
        mixed = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
        if some is not None:
            mixed = torch.where(some, mixed, 0)
        if out is None:
            return mixed
        out[torch.tensor(part.where.rows, device=out.device)] = mixed
    assert out is not None
    return out


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _merged(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    given: GivenKeys,
    mask: Tensor | None,
    scaling: float,
    cap: float | None,
) -> Tensor:
    """One group on a CPU: each part by the fused kernel, with the queries of a key's head as further queries, then merged.

    The kernel that `scaled_dot_product_attention` runs here also returns the log-sum-exp of each query's scores; no public
    function hands it on. Masked scores are far below all others instead of infinitely, so that a part in which a query sees
    nothing has a weight of zero and no NaN.
    """
    (n, heads, q, dim), kv = query.shape, keys.shape[1]
    group, shared = heads // kv, sum(k.shape[1] for k in given.keys)
    outs: list[Tensor] = []
    sums: list[Tensor] = []
    if keys.shape[2]:
        hidden = None if mask is None else _added(mask[:, :, shared:], group)
        out, total = _fused(query.reshape(n, kv, group * q, dim), keys, values, hidden, scaling)
        outs.append(out.view(n, kv, group, q, dim))
        sums.append(total.view(n, kv, group, q))
    # Queries in front of the pictures see none of them, and those behind see all: both need no mask.
    first, plain = (0, True) if mask is None else _split(mask[:, :, :shared])
    first = first if outs else 0
    late = query.view(n, kv, group, q, dim)[..., first:, :]
    folded = late.transpose(0, 1).reshape(1, kv, -1, dim)
    before = 0
    for k, v in zip(given.keys, given.values, strict=True):
        hidden = None
        if mask is not None and not plain:
            hidden = _added(mask[:, first:, before : before + k.shape[1]], group).reshape(1, folded.shape[2], -1)
        if folded.shape[2]:
            out, total = _fused(folded, k.unsqueeze(0), v.unsqueeze(0), hidden, scaling)
            outs.append(out.view(kv, n, group, q - first, dim).transpose(0, 1))
            sums.append(total.view(kv, n, group, q - first).transpose(0, 1))
        before += k.shape[1]
    mixed = outs[0]
    if len(outs) > 1:
        ends = [out[..., out.shape[3] - (q - first) :, :] for out in outs]
        shares = torch.stack([total[..., total.shape[3] - (q - first) :] for total in sums]).softmax(0).unsqueeze(-1)
        merged = ends[0] * shares[0]
        for out, share in zip(ends[1:], shares[1:], strict=True):
            merged = torch.addcmul(merged, out, share) if out.dtype == merged.dtype else merged + out * share
        mixed = torch.cat([outs[0][..., :first, :], merged.to(query.dtype)], dim=3)
    return mixed.reshape(n, heads, q, dim).transpose(1, 2).flatten(2)


def _added(mask: Tensor, group: int) -> Tensor:
    """`[n q s]`, who may meet whom, to what is added to the scores of `group` queries a place: `[n group*q s]`."""
    return torch.where(mask, 0.0, FAR).unsqueeze(1).expand(-1, group, -1, -1).flatten(1, 2)


def _split(mask: Tensor) -> tuple[int, bool]:
    """From which query on any key is seen, and whether all are seen from there on. mask: `[n q s]`, on the host."""
    some, every = mask.any(-1).any(0), mask.all(-1).all(0)
    first = int(some.int().argmax()) if bool(some.any()) else mask.shape[1]
    return first, bool(every[first:].all())


def _fused(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """`[b heads q head_dim]` and the log-sum-exp `[b heads q]` of the scores."""
    # The kernel itself divides by these.
    assert query.shape[2] * keys.shape[2] > 0, "attention over nothing"
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, attn_mask=None if mask is None else mask.unsqueeze(1), scale=scaling
    )


def _joint(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    given: GivenKeys,
    mask: Tensor | None,
    scaling: float,
    cap: float | None,
) -> Tensor:
    """One group: scores `[kv_heads n group*q s]`, so that a given key meets all queries of its head in one product."""
    (n, heads, q, dim), kv = query.shape, keys.shape[1]
    group = heads // kv
    grouped = query.reshape(n, kv, group * q, dim)
    folded = grouped.transpose(0, 1).reshape(kv, n * group * q, dim)
    nothing = query.new_empty(())
    scores = [
        torch.baddbmm(nothing, folded, k.transpose(1, 2), beta=0, alpha=scaling).view(kv, n, group * q, -1)
        for k in given.keys
    ]
    own = torch.baddbmm(nothing, grouped.flatten(0, 1), keys.transpose(2, 3).flatten(0, 1), beta=0, alpha=scaling).view(
        n, kv, group * q, -1
    )
    joined = capped(torch.cat([*scores, own.transpose(0, 1)], dim=-1), cap)
    if mask is not None:
        by_head = joined.view(kv, n, group, q, -1)
        by_head.masked_fill_(~mask[:, None], torch.finfo(joined.dtype).min)
    weights = joined.softmax(-1, dtype=torch.float32).to(query.dtype)
    *shared, rest = weights.split([*(k.shape[1] for k in given.keys), keys.shape[2]], dim=-1)
    mixed = (rest.transpose(0, 1) @ values).transpose(0, 1)
    for weight, value in zip(shared, given.values, strict=True):
        mixed = mixed + (weight.reshape(kv, n * group * q, -1) @ value).view(kv, n, group * q, dim)
    # [kv n group*q dim] -> [n q heads*dim]
    return mixed.view(kv, n, group, q, dim).permute(1, 3, 0, 2, 4).reshape(n, q, heads * dim)
