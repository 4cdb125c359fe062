"""The KV cache under a plan: per layer, ragged a row, padded; each slot knows its original index."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from sparing.execute.given import GivenKeys
from sparing.plan import Ledger
from sparing.tokens import TokenMap


@dataclasses.dataclass(eq=False)
class RunState:
    """What persists from the prompt through decoding, beside keys and values. It travels with the cache.

    Attributes:
        executor: which executor made it.
        policies: names of the policies that it was made under.
        tokens: every token so far.
        prompt_length: tokens of the prompt, padding included.
        idle: whether the stock forward runs (no policy has anything to say about this prompt).
        memories: one dictionary a policy; tensors in them have the batch first.
        ledger: the record of this prompt.
        dropped_at: `[b T]`, the layer from which a token is dropped (the depth, if it never is); `None` if none is.
        readable: one `[b T]` mask a layer of what can be read (`dense` only); `None` where nothing was hidden.
        shift: `[b n]`, how far the position of each prompt token moved when the prompt was re-indexed.
        unfinished: whether a pass is under way, or failed half-way.
    """

    executor: str
    policies: tuple[str, ...]
    tokens: TokenMap
    prompt_length: int
    idle: bool
    memories: list[dict[Any, Any]]
    ledger: Ledger
    depth: int
    dropped_at: Tensor | None = None
    readable: list[Tensor | None] = dataclasses.field(default_factory=list)
    shift: Tensor | None = None
    unfinished: bool = False

    def extend(self, new: TokenMap) -> None:
        """Take in the tokens of another pass."""
        self.tokens = self.tokens.extend(new)
        if self.dropped_at is not None:
            fresh = self.dropped_at.new_full((new.batch, new.length), self.depth)
            self.dropped_at = torch.cat([self.dropped_at, fresh], dim=1)

    def fork(self) -> RunState:
        """The same state once more: what happens to one no longer reaches the other."""
        return dataclasses.replace(
            self,
            memories=[dict(memory) for memory in self.memories],
            readable=list(self.readable),
            ledger=self.ledger.fork(),
        )

    def select(self, rows: Tensor) -> None:
        """Reorder or repeat the rows of the batch."""
        rows = rows.to(self.tokens.group.device)
        self.tokens = self.tokens.select(rows)
        self.memories = [_select(m, rows) for m in self.memories]
        self.dropped_at, self.shift = _select(self.dropped_at, rows), _select(self.shift, rows)
        self.readable = [_select(r, rows) for r in self.readable]
        self.ledger.reorder(rows)

    def crop(self, length: int) -> None:
        """Forget the tokens after the first `length`."""
        self.tokens = self.tokens.crop(length)
        self.prompt_length = min(self.prompt_length, length)
        self.shift = None if self.shift is None else self.shift[:, :length]
        self.ledger.crop(length)
        self.dropped_at = None if self.dropped_at is None else self.dropped_at[:, :length]
        self.readable = [None if r is None else r[:, :length] for r in self.readable]


def _select(value: Any, rows: Tensor) -> Any:
    if isinstance(value, Tensor) and value.ndim:
        return value.index_select(0, rows.to(value.device))
    if isinstance(value, dict):
        return {k: _select(v, rows) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_select(v, rows) for v in value)
    return value


class RaggedLayer(CacheLayerMixin):
    """Keys and values of one layer: only those that can be read, each with its original index.

    Attributes:
        keys: `[b kv_heads s head_dim]`, after rotary embedding.
        values: `[b kv_heads s head_dim]`.
        index: `[b s]`, original indices, -1 in empty slots.
        holes: whether any slot may be empty (known on the host).
        given: keys and values of pictures that a `VisionPrefix` holds, read beside the layer's own (`attend_beside`).
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, state: RunState) -> None:
        super().__init__()
        self.state = state
        self.index: Tensor | None = None
        self.holes = False
        self.given: tuple[GivenKeys, ...] = ()

    @property
    def position_ids(self) -> Tensor | None:
        """`[b s]` (or `[axes b s]`), the position ids of the slots; 0 in empty ones."""
        if self.index is None:
            return None
        at = self.index.clamp(min=0).expand(*self.state.tokens.position_ids.shape[:-1], -1)
        return self.state.tokens.position_ids.gather(-1, at) * (self.index >= 0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is set up before the first append."""
        return

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: a stock attention module does not know about ragged slots."""
        raise RuntimeError(
            "a sparing cache was handed to a stock forward: use it inside the `with sparing.apply(...)` that made it"
        )

    def append(self, keys: Tensor, values: Tensor, index: Tensor, holes: bool) -> None:
        """Add slots. keys, values: `[b kv_heads m head_dim]`; index: `[b s+m]`, that of all slots."""
        if self.keys is None:
            self.keys, self.values = keys, values
        else:
            self.keys = torch.cat([self.keys, keys], dim=-2)
            self.values = torch.cat([self.values, values], dim=-2)  # type: ignore[list-item]
        self.index, self.holes, self.is_initialized = index, self.holes or holes, True

    def free(self, freed: Tensor) -> None:
        """Give up the slots of the tokens marked in `freed` `[b T]`, and their memory; given keys are merely read no longer."""
        self.given = tuple(dataclasses.replace(part, where=part.where.without(freed)) for part in self.given)
        if self.keys is None or self.index is None:
            return
        self.take(*kept_slots(self.index, (self.index >= 0) & ~freed.gather(1, self.index.clamp(min=0))))

    def take(self, order: Tensor, index: Tensor, holes: bool) -> None:
        """Hold only the slots `order` `[b s]`, whose indices are `index` (see `kept_slots`)."""
        assert self.keys is not None
        at = order[:, None, :, None].expand(-1, self.keys.shape[1], -1, self.keys.shape[3])
        self.keys, self.values = self.keys.gather(2, at), self.values.gather(2, at)  # type: ignore[union-attr]
        self.index, self.holes = index, holes

    def readable(self, length: int) -> Tensor:
        """`[b length]`, which tokens have a slot."""
        assert self.index is not None
        out = torch.zeros(self.index.shape[0], length + 1, dtype=torch.bool, device=self.index.device)
        out.scatter_(1, torch.where(self.index < 0, length, self.index), True)
        for part in self.given:
            at = torch.tensor(part.where.rows, device=out.device).unsqueeze(1)
            out[at, torch.where(part.where.index < 0, length, part.where.index)] = True
        return out[:, :length]

    def whole(self) -> tuple[Tensor, Tensor] | None:
        """Keys and indices of all slots, given ones brought in as copies; `None` if there are none."""
        if self.keys is None or self.index is None or not self.given:
            return None if self.keys is None or self.index is None else (self.keys, self.index)
        b, width = self.index.shape[0], max(part.where.index.shape[1] for part in self.given)
        keys = self.keys.new_zeros(b, self.keys.shape[1], width, self.keys.shape[3])
        index = self.index.new_full((b, width), -1)
        for part in self.given:
            rows, count = torch.tensor(part.where.rows, device=index.device), part.where.index.shape[1]
            if count:
                keys[rows, :, :count], index[rows, :count] = torch.cat(part.keys, dim=1), part.where.index
        return torch.cat([keys, self.keys], dim=2), torch.cat([index, self.index], dim=1)

    def get_seq_length(self) -> int:
        """The logical length: every token so far, stored here or not."""
        return self.state.tokens.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As a cache that held every token would answer."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def select(self, rows: Tensor, memo: dict[int, Any]) -> None:
        """Reorder or repeat the rows of the batch; layers that shared an index go on sharing it."""
        if self.given:
            for part in self.given:
                if id(part.where) not in memo:
                    memo[id(part.where)] = part.where.select(rows.tolist())
            self.given = tuple(
                dataclasses.replace(part, where=memo[id(part.where)])
                for part in self.given
                if memo[id(part.where)].rows
            )
        if self.keys is None or self.index is None:
            return
        rows = rows.to(self.keys.device)
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)  # type: ignore[union-attr]
        if id(self.index) not in memo:
            memo[id(self.index)] = self.index.index_select(0, rows)
        self.index = memo[id(self.index)]

    def crop_to(self, length: int) -> None:
        """Give up the slots of tokens from `length` on."""
        if self.index is not None:
            total = max(int(self.index.max()) + 1, length) if self.index.numel() else length
            total = max(total, self.state.tokens.length if self.given else 0)
            self.free((torch.arange(total, device=self.index.device) >= length).expand(self.index.shape[0], total))

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self.index = None
        self.given = ()
        self.is_initialized, self.holes = False, False


def kept_slots(index: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Where the slots to keep are, close together; their indices; and whether rows differ in their number. Waits once."""
    width, fewest = torch.stack([keep.sum(1).max(), keep.sum(1).min()]).tolist()
    order = torch.argsort(~keep, dim=1, stable=True)[:, :width]
    return order, torch.where(keep.gather(1, order), index.gather(1, order), -1), fewest < width


class PlannedCache(DynamicCache):
    """A `DynamicCache` that carries a `RunState`, so that beams, cropping and repeats reach both.

    Its layers are stock `DynamicLayer`s under `dense` (and where no policy has anything to say), `RaggedLayer`s under `gathered`.
    """

    state: RunState
    held_from: list[int]
    """By layer, the first original index that is still held: what lies before the window is let go."""

    @classmethod
    def adopt(
        cls, cache: DynamicCache | None, state: RunState, depth: int, *, ragged: bool, config: Any = None
    ) -> PlannedCache:
        """Turn an empty cache into a planned one, in place: `generate` and callers keep the object that they passed.

        Args:
            cache: the caller's, if there is one.
            state: what the cache shall carry.
            depth: number of layers.
            ragged: whether the fast executor fills it.
            config: the decoder's; a cache of the stock forward has the kinds of layers that it asks for.
        """
        planned = DynamicCache(config=config) if cache is None else cache
        planned.__class__ = cls
        assert isinstance(planned, PlannedCache)
        planned.state, planned.held_from = state, [0] * depth
        if ragged:
            planned.layers = [RaggedLayer(state) for _ in range(depth)]
            planned.layer_class_to_replicate = None
        elif not state.idle:
            # A plan may hide any key, so its mask speaks of all of them, also in layers that have a window.
            planned.layers = [DynamicLayer() for _ in range(depth)]
            planned.layer_class_to_replicate = None
        return planned

    def make_whole(self) -> None:
        """Let the layers that the stock forward filled hold every token. What a window let go no one can see: it is zeros."""
        length = self.state.tokens.length
        layers, self.layers = self.layers, []
        for i, layer in enumerate(layers):
            assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None  # noqa: PT018
            whole = DynamicLayer()
            missing = self.held_from[i] = length - layer.keys.shape[-2]
            whole.update(*(F.pad(x, (0, 0, missing, 0)) for x in (layer.keys, layer.values)))
            self.layers.append(whole)
        self.layer_class_to_replicate = None

    def make_ragged(self) -> None:
        """Turn the layers that the stock forward filled into ragged ones."""
        self.make_whole()
        tokens = self.state.tokens
        index = torch.arange(tokens.length, device=tokens.group.device).expand(tokens.batch, -1)
        index = torch.where(tokens.valid, index, -1) if tokens.padded else index
        layers, self.layers = self.layers, [RaggedLayer(self.state) for _ in range(self.state.depth)]
        for ragged, layer in zip(self.layers, layers, strict=True):
            assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None  # noqa: PT018
            ragged.append(layer.keys, layer.values, index, tokens.padded)
        self.layer_class_to_replicate = None

    def fork(self, rows: Tensor) -> PlannedCache:
        """A cache that goes on from these rows, repeated or left out as they say; this one stays as it is.

        So a prompt that was read once can be continued in many ways. What the new cache's passes cost is in a ledger of its own.

        Args:
            rows: `[n]`, the rows of this cache that the new one's continue.
        """
        forked = copy.copy(self)
        forked.state, forked.held_from = self.state.fork(), list(self.held_from)
        forked.layers = [copy.copy(layer) for layer in self.layers]
        for layer in forked.layers:
            if isinstance(layer, RaggedLayer):
                layer.state = forked.state
        forked._select(rows)
        return forked

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows, as beam search does."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        b = self.state.tokens.batch
        self._select(torch.arange(b, device=self.state.tokens.group.device).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; a negative number says how many.

        Raises:
            ValueError: the number is positive (as in transformers, where that form is gone), or no token would be left.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass a negative number of tokens to remove")
        length = self.state.tokens.length + tokens_to_remove
        if length < 1:
            raise ValueError(
                f"crop({tokens_to_remove}) leaves none of {self.state.tokens.length} tokens: start a new prompt"
            )
        for i, shape in enumerate(self.state.ledger.shape.layers):
            layer: Any = self.layers[i] if i < len(self.layers) else None
            lost = layer.cumulative_length - layer.keys.shape[-2] if layer is not None and layer.is_sliding else 0
            if shape.window is not None and max(lost, self.held_from[i]) > max(length - shape.window + 1, 0):
                raise ValueError(
                    f"crop({tokens_to_remove}): layer {i} has a window of {shape.window} tokens, and has let go of keys that "
                    "would be in it again: start a new prompt"
                )
        for layer in self.layers:
            if isinstance(layer, RaggedLayer):
                layer.crop_to(length)
            else:
                layer.crop(tokens_to_remove)  # type: ignore[attr-defined]
        self.state.crop(length)

    def reset(self) -> None:
        """Forget keys, values and the prompt: refused, since the plan belongs to the prompt."""
        raise RuntimeError("a planned cache belongs to its prompt: start a new one instead of resetting it")

    def _select(self, rows: Tensor) -> None:
        memo: dict[int, Any] = {}
        for layer in self.layers:
            if isinstance(layer, RaggedLayer):
                layer.select(rows, memo)
            elif isinstance(layer, DynamicLayer) and layer.get_seq_length():
                assert layer.keys is not None
                at = rows.to(layer.keys.device)
                layer.keys, layer.values = layer.keys.index_select(0, at), layer.values.index_select(0, at)  # type: ignore[union-attr]
        self.state.select(rows)
