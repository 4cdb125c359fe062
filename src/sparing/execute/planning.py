"""`Pass`: one forward pass under policies. Both executors ask it what to compute, and it writes the ledger."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparing.anatomy import Anatomy
from sparing.execute.cache import PlannedCache, RaggedLayer, RunState
from sparing.execute.encoder import EncoderNotes
from sparing.execute.given import Given, beside
from sparing.execute.rows import Rows
from sparing.execute.views import LayerView, StartView
from sparing.execute.visibility import visible, within
from sparing.plan import FULL, LayerPlan, Policy
from sparing.plan.layer_plan import Mask, Sees, both
from sparing.plan.ledger import LayerRecord, PassRecord
from sparing.tokens import Group, ImageSpan, TokenMap


class Pass:
    """One forward pass: its tokens, what is alive, the plans of its layers, and what was looked up on the way.

    Masks, row choices and attention masks are shared between layers whose plans share their tensors (compared by identity), so
    a decision that holds for the whole model is worked out once.

    Attributes:
        start: original index of the first new token.
        new: the new tokens.
        prefill: whether this is the prompt.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        policies: Sequence[Policy],
        state: RunState,
        new: TokenMap,
        *,
        prefill: bool,
        device: torch.device,
        logit_rows: int,
        encoder_features: Any,
        encoder: EncoderNotes,
        encoded: int | None = None,
    ) -> None:
        self.anatomy, self.policies, self.state = anatomy, policies, state
        self.new, self.prefill, self.device = new, prefill, device
        self.start = state.tokens.length - new.length
        self.encoder_features, self.encoder = encoder_features, encoder
        self.valid: Mask = new.valid if new.padded else True
        self.rotary: dict[str, tuple[Tensor, Tensor]] = {}
        """Cosines and sines of the new tokens, by the kind of layer (`Anatomy.rotary_kind`)."""
        self.cache: PlannedCache | None = None
        self.given: Given | None = None
        """What a `VisionPrefix` brought of this prompt's pictures."""
        self.additions: dict[int, tuple[Tensor, Tensor]] = {}
        """What the model adds to the residual stream after a layer (`Anatomy.additions`)."""
        self._drops: list[int] = []
        self._memo: dict[tuple[Any, ...], Any] = {}
        self._kept: list[Any] = []
        pictures = [span for row in new.images for span in row if span.start >= self.start]
        self.record = PassRecord(
            start=self.start,
            valid=self.valid,
            batch=new.batch,
            length=new.length,
            logit_rows=logit_rows,
            pictures=len(pictures),
            encoder=_encoder_flops(anatomy, pictures, encoded),
            layers=[LayerRecord(True, True, True) for _ in range(state.depth)],
            prefill=prefill,
        )
        state.ledger.begin(self.record)

    # Plans ---------------------------------------------------------------------------------------------------------

    def begin_prompt(self, embeds: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Let every policy look at the prompt once; returns embeddings and positions as they left them."""
        view = StartView(self, embeds, position_ids)
        for policy, memory in zip(self.policies, self.state.memories, strict=True):
            view.state = memory
            policy.start(view)
        embeds = view.rewritten()
        if view.position_ids is not position_ids:
            if position_ids.ndim != 2 or self.new.position_ids.ndim != 2:
                raise ValueError("re-indexing positions of several axes (M-RoPE) is not supported: keep the positions")
            self.state.shift = (position_ids - view.position_ids).expand(self.new.batch, -1)
            moved = view.position_ids.expand(self.new.batch, -1)
            self.state.tokens = self.new = dataclasses.replace(self.new, position_ids=moved)
        if self.given is not None:
            self.given.settle(
                self.anatomy.positions(view.position_ids.expand(*view.position_ids.shape[:-2], self.new.batch, -1))
            )
        return embeds, view.position_ids

    def plan_attend(self, layer: int, residual: Callable[[], Tensor]) -> LayerPlan:
        """What the layer computes, as far as it is known before attention; padding and dropped tokens taken out."""
        plan = FULL
        view: LayerView | None = None
        for policy, memory in self._deciding():
            view = view or LayerView(self, layer, residual, None, attended=False)
            view.state = memory
            plan = plan & policy.plan_attend(view)
        return self._restrict(plan, layer)

    def plan_feed(
        self, layer: int, residual: Callable[[], Tensor], layer_input: Tensor | None, plan: LayerPlan
    ) -> LayerPlan:
        """The same plan with its MLP decided, after attention; recorded in the ledger."""
        view: LayerView | None = None
        for policy, memory in self._deciding():
            view = view or LayerView(self, layer, residual, layer_input, attended=True, plan=plan)
            view.state = memory
            decided = policy.plan_feed(view)
            self._check_mask("feed", decided.feed)
            plan = plan.feeding(decided)
        record = self.record.layers[layer]
        record.attend, record.feed, record.sees = plan.attend, plan.feed, plan.sees
        record.read = plan.read
        return plan

    def _deciding(self) -> list[tuple[Policy, dict[Any, Any]]]:
        """The policies that decide in this pass: one that is not causal has decided at prefill."""
        return [(p, m) for p, m in zip(self.policies, self.state.memories, strict=True) if self.prefill or p.decodes]

    def _restrict(self, plan: LayerPlan, layer: int) -> LayerPlan:
        """Take padding and dropped tokens out of a plan, and split what it says of cached tokens off (`freed`)."""
        read, long = plan.read, None
        if isinstance(read, Tensor) and read.shape[-1] != self.new.length:
            if read.shape[-1] != self.state.tokens.length:
                raise ValueError(
                    f"LayerPlan.read covers {read.shape[-1]} tokens; give one entry for each of the {self.new.length} new tokens, "
                    f"or for all {self.state.tokens.length} so far"
                )
            long, read = read, read[:, self.start :]
        for name, mask in (("attend", plan.attend), ("feed", plan.feed), ("read", read)):
            self._check_mask(name, mask)
        self.record.layers[layer].freed = self.freed(layer, long)
        here = self.here(layer)
        if here is True and read is plan.read:
            return plan
        attend, feed, read = (self.meet(m, here) for m in (plan.attend, plan.feed, read))
        # A weight must vanish wherever its branch is left out: `dense` multiplies by the weight alone.
        attend_weight, feed_weight = (
            w * here.to(w.dtype) if w is not None and isinstance(here, Tensor) else w
            for w in (plan.attend_weight, plan.feed_weight)
        )
        return dataclasses.replace(
            plan, attend=attend, feed=feed, read=read, attend_weight=attend_weight, feed_weight=feed_weight
        )

    def _check_mask(self, name: str, mask: Mask) -> None:
        """Raise `ValueError` unless a plan's mask is boolean and speaks of this pass's tokens."""
        if not isinstance(mask, Tensor):
            return
        if mask.shape[-1] != self.new.length:
            raise ValueError(f"LayerPlan.{name} covers {mask.shape[-1]} tokens; this pass has {self.new.length}")
        if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[0] not in (1, self.new.batch):
            raise ValueError(
                f"LayerPlan.{name} is {mask.dtype} of shape {tuple(mask.shape)}; give a boolean mask "
                f"[{self.new.batch} {self.new.length}] (weights go in attend_weight and feed_weight)"
            )

    def filled(self, x: Tensor, layer: int) -> Tensor:
        """The residual stream as it enters a layer, given tokens put in: nothing but who looks at the whole needs them."""
        return x if self.given is None else self.given.fill(x, layer)

    def own(self, layer: int, plan: LayerPlan) -> Mask:
        """Whose keys and values a layer computes: those it reads, less those that were given."""
        if self.given is None or plan.read is False:
            return plan.read
        given: Given = self.given
        masks = (plan.read, plan.attend, plan.feed)
        held = given.holds(layer)
        return self.memo(("own", held, *map(id, masks)), lambda: given.others(masks, layer), *masks)

    @property
    def frozen(self) -> Tensor | None:
        """`[b t]`, the pictures' tokens, where no layer changes them: neither a branch nor what a model adds between layers."""
        if self.given is not None or self.additions or not self.new.has(Group.IMAGE):
            return None
        if not any(Group.IMAGE in policy.freezes for policy, _ in self._deciding()):
            return None
        return self.memo(("frozen",), lambda: self.new.of(Group.IMAGE))

    def changing(self, plan: LayerPlan, frozen: Tensor) -> Mask:
        """Tokens that are not frozen: the same tensor as one of the plan's masks, where it is one of them."""
        masks = (plan.attend, plan.feed)
        return self.memo(("changing", *map(id, masks)), lambda: beside(frozen, self.valid, masks), *masks)

    def here(self, layer: int) -> Mask:
        """Which new tokens are neither padding nor dropped in this layer; `True` if all are."""
        dropped_at = self.state.dropped_at
        passed = sum(level <= layer for level in self._drops)
        if dropped_at is None or not passed:
            return self.valid
        alive = self.memo(("here", id(dropped_at), passed), lambda: dropped_at[:, self.start :] > layer, dropped_at)
        return self.meet(alive, self.valid)

    def alive(self, layer: int) -> Tensor:
        """`[b T]`, which tokens so far are neither padding nor dropped in this layer."""
        valid = self.state.tokens.valid
        return valid if self.state.dropped_at is None else valid & (self.state.dropped_at > layer)

    def addition(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """What is added after a layer to tokens that are in the next one: `[b t]` and `[n d]`; `None` if there is nothing."""
        if layer not in self.additions:
            return None
        where, features = self.additions[layer]
        here = self.here(layer + 1)
        if not isinstance(here, Tensor):
            return where, features
        return self.memo(("added", id(where), id(here)), lambda: where & here, where, here), features[here[where]]

    def drop(self, mask: Tensor, layer: int) -> None:
        """Drop tokens `[b T]` from `layer` on."""
        tokens = self.state.tokens
        if mask.shape != (tokens.batch, tokens.length):
            raise ValueError(
                f"drop() got a mask of shape {tuple(mask.shape)}, expected {(tokens.batch, tokens.length)}"
            )
        if self.state.dropped_at is None:
            self.state.dropped_at = torch.full_like(tokens.group, self.state.depth, dtype=torch.int32)
        self.state.dropped_at = torch.where(mask, self.state.dropped_at.clamp(max=layer), self.state.dropped_at)
        self._drops.append(layer)

    def freed(self, layer: int, read: Tensor | None) -> Tensor | None:
        """Which cached tokens `[b past]` this pass frees in a layer: those hidden by a plan's `read`, those dropped now."""
        freed = None if read is None else ~read[:, : self.start].expand(self.new.batch, -1)
        if self.start and self.state.dropped_at is not None and any(level <= layer for level in self._drops):
            dropped = self.state.dropped_at[:, : self.start] <= layer
            freed = dropped if freed is None else freed | dropped
        return freed

    def cached_keys(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Keys of earlier passes `[b kv_heads s head_dim]`, their original indices `[b s]`, and which may be read `[b past]`."""
        if self.cache is None or not self.start:
            return None
        stored = self.cache.layers[layer]
        if isinstance(stored, RaggedLayer):
            if (whole := stored.whole()) is None:
                return None
            keys, index = whole
            return keys, torch.where(index < self.start, index, -1), None
        past = torch.arange(self.start, device=self.device).expand(self.new.batch, self.start)
        hidden = self.state.readable[layer]
        return stored.keys[:, :, : self.start], past, None if hidden is None else hidden[:, : self.start]  # type: ignore[index]

    # What layers share ---------------------------------------------------------------------------------------------

    def memo(self, key: tuple[Any, ...], build: Any, *keep: Any) -> Any:
        """Look up or build; `keep` holds what the key's identities speak of, so that no identity is reused."""
        if key not in self._memo:
            self._memo[key] = build()
            self._kept.append(keep)
        return self._memo[key]

    def meet(self, a: Mask, b: Mask) -> Mask:
        """The intersection of two masks, shared between layers."""
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return both(a, b)
        return self.memo(("meet", id(a), id(b)), lambda: both(a, b), a, b)

    def rows(self, mask: Mask, capacity: int | None = None, *, blocked: bool = False) -> Rows:
        """The row choice of a mask, shared between layers."""
        key = mask if isinstance(mask, bool) else id(mask)
        b, t = self.new.batch, self.new.length
        return self.memo(("rows", key), lambda: Rows(mask, b, t, self.device, capacity, blocked=blocked), mask)

    def rotate(self, layer: int, x: Tensor, rows: Rows | None = None) -> Tensor:
        """Rotate the queries or keys of chosen rows (of all new tokens by default), where the layer rotates them."""
        kind = self.anatomy.rotary_kind(layer)
        if kind is None:
            return x
        cos, sin = self.rotary[kind]
        if rows is not None:
            chosen: Rows = rows
            cos, sin = self.memo(("angles", kind, id(rows)), lambda: (chosen.take(cos), chosen.take(sin)), rows)
        return self.anatomy.rotate(x, cos, sin)

    def sees(self, layer: int, sees: Sees | None) -> Sees | None:
        """A plan's `sees` within the layer's window, where one bites."""
        window = self.state.ledger.shape.layers[layer].window
        if window is None or self.state.tokens.length <= window:
            return sees
        return self.memo(("window", window, id(sees)), lambda: within(window, sees), sees)

    def visible(
        self, query: Tensor, key: Tensor, sees: Sees | None, *, certain: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """`[b q k]`, which slots each query may read, and `[b q 1]`, whether there is any (`None` if that is `certain`).

        query `[b q]` and key `[b k]` hold original indices, -1 in empty slots. Queries that may read nothing are let see
        everything, so that no softmax runs over nothing: the caller zeroes their result.
        """
        return self.memo(
            ("visible", id(query), id(key), id(sees), certain),
            lambda: visible(query, key, sees, certain=certain),
            query,
            key,
            sees,
        )


def _encoder_flops(anatomy: Anatomy, pictures: Sequence[ImageSpan], encoded: int | None) -> int:
    """Of the pictures of a pass; `encoded` tokens came out of the encoder (`generate` repeats them for beams)."""
    flops = sum(anatomy.picture_flops(span) for span in pictures)
    tokens = sum(span.stop - span.start for span in pictures)
    return flops if encoded is None or encoded >= tokens else flops * encoded // tokens
