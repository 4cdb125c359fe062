"""The fast executor: only the rows that a plan asks for go through matrix products, and only readable keys are stored."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.anatomy import Anatomy
from sparing.execute.cache import RaggedLayer, kept_slots
from sparing.execute.given import GivenKeys, GivenRows, attend_beside
from sparing.execute.planning import Pass
from sparing.execute.rows import Residual, Rows
from sparing.plan import LayerPlan


class Gathered:
    """Runs the layers of a decoder row by row as planned. Equal to `dense` (tests/test_parity.py).

    Attention runs on PyTorch's SDPA, or on the family's own eager function where the model does or scores are capped. A model that
    was loaded with flash or flex attention is no exception: flash kernels hide nothing but padding and the future (its corner at
    the bottom right), a block mask for flex would cost a compilation a plan, and SDPA means the same.

    Args:
        anatomy: where the parts of the model are.

    Raises:
        ValueError: the model's attention function is none that computes what SDPA does.
    """

    name = "gathered"
    ragged = True

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self._eager = False
        self._unit: Tensor | None = None
        anatomy.masks(exact=True)

    def run(
        self, run: Pass, held: list[Tensor], keep_hidden: bool, keep_last: int | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All layers and the final norm.

        Args:
            run: the pass.
            held: the embeddings `[b t d]`, alone in a list, so that their memory is free once they are used.
            keep_hidden: whether to return each layer's input as well.
            keep_last: how many last tokens the final norm is asked of; all by default.
        """
        anatomy = self.anatomy
        # Asked again: the model's attention can be changed between passes.
        anatomy.masks(exact=True)
        self._eager = anatomy.attention_backend == "eager"
        self._unit = None
        looks_back = any(p.looks_back for p in run.policies)
        x = Residual(held.pop(), in_place=not torch.is_grad_enabled())
        hidden: list[Tensor] = []

        def whole(level: int) -> Tensor:
            """The residual stream for whoever looks at it, given tokens put in."""
            return run.filled(x.whole(), level)

        for layer in range(len(anatomy.layers)):
            residual = functools.partial(whole, layer)
            if keep_hidden and layer == 0:
                hidden.append(residual().clone())
            plan = run.plan_attend(layer, residual)
            assert plan.zeroes is None, "ablations are refused when applied"
            if plan.rewrites is not None:
                if run.given is not None:
                    raise ValueError(
                        "a policy merges tokens between layers (SparseVLM), but a VisionPrefix holds pictures whose keys are made "
                        "already: use sparing.apply on the pictures themselves"
                    )
                x.replace(plan.rewrites(x.keep()))
                self._unit = None
            # Kept only for those who look back: it is a whole residual stream.
            layer_input = run.filled(x.keep(), layer) if looks_back else None
            _refuse_gate_gradients(plan.attend_weight)
            _refuse_gate_gradients(plan.block_weight)
            before = None if plan.block_weight is None else x.keep()
            branch, rows = self._attention(run, layer, x, plan)
            if branch is not None:
                x.add(rows, _weighted(branch, plan.attend_weight, rows))
            plan = run.plan_feed(layer, residual, layer_input, plan)
            _refuse_gate_gradients(plan.feed_weight)
            rows = run.rows(plan.feed, plan.capacity)
            if not rows.none:
                branch = anatomy.run_mlp(layer, anatomy.mlp_norm(layer)(x.take(rows)))
                x.add(rows, _weighted(anatomy.finish_mlp(layer, branch), plan.feed_weight, rows))
            if before is not None and plan.block_weight is not None:
                x.replace(before + plan.block_weight.unsqueeze(-1).to(before.dtype) * (x.whole() - before))
            if keep_hidden and layer + 1 < len(anatomy.layers):
                # As in transformers: without what is added between layers.
                hidden.append(residual().clone())
            if (addition := run.addition(layer)) is not None:
                rows = run.rows(addition[0])
                if not rows.none:
                    x.add(rows, addition[1].to(x.take(rows)).view_as(x.take(rows)))
            if run.given is not None:
                run.given.passed(layer, run.here(layer + 1))
        self._unit = None
        if keep_last is not None and (run.given is None or run.given.reach <= run.new.length - keep_last):
            last = anatomy.decoder.norm(x.whole()[:, -keep_last:])
        else:
            last = anatomy.decoder.norm(whole(len(anatomy.layers)))
        return last, (*hidden, last) if keep_hidden else ()

    def _attention(self, run: Pass, layer: int, x: Residual, plan: LayerPlan) -> tuple[Tensor | None, Rows]:
        """The attention branch of the attending rows, packed; `None` if there are none."""
        anatomy = self.anatomy
        readers = run.rows(plan.attend, plan.capacity, blocked=True)
        written = run.rows(run.own(layer, plan))
        norm = anatomy.attention_norm(layer)
        stored = run.cache.layers[layer] if run.cache is not None else None
        assert stored is None or isinstance(stored, RaggedLayer)
        if stored is not None and (freed := run.record.layers[layer].freed) is not None:
            _check_freed(run, stored, freed, plan, layer)
            stored.free(freed)
        if stored is not None:
            _let_go(run, stored, layer)
        given: tuple[GivenKeys, ...] = ()
        if run.given is not None and plan.read is not False:
            given = run.given.keys(layer, plan.read, run.memo)
            run.record.layers[layer].given = run.given.image
        elif stored is not None:
            given = stored.given
        if written.none and readers.none and not given:
            return None, readers
        normed = None
        keys = values = index = None
        holes = False
        if not written.none:
            normed = self._normed(run, layer, x, plan, written)
            key = run.rotate(layer, anatomy.key(layer, normed), written)
            keys = written.pad(key).transpose(1, 2)
            values = written.pad(anatomy.value(layer, normed)).transpose(1, 2)
            holes = written.ragged
            index = run.memo(("index", id(written)), lambda: _shifted(written.index, run.start), written)
        alone = stored is None or stored.keys is None
        if stored is not None:
            if keys is not None and values is not None and index is not None:
                past, new = stored.index, index
                if past is not None:
                    index = run.memo(("joined", id(past), id(new)), lambda: torch.cat([past, new], dim=1), past, new)
                stored.append(keys, values, index, holes)
            stored.given = given
            keys, values, index, holes = stored.keys, stored.values, stored.index, stored.holes
        if readers.none:
            return None, readers
        if given:
            known = normed if readers is written else None
            mixed = self._beside(run, layer, x, readers, (keys, values, index, holes), given, plan, known)
            out = anatomy.project(layer, readers.unpad(mixed))
            return anatomy.finish_attention(layer, out), readers
        if keys is None or values is None or index is None:
            # Nothing can be read in this layer: the attention result is zero, and what the projection adds is its bias.
            shape = run.state.ledger.shape.layers[layer]
            rows = x.take(readers)
            mixed = rows.new_zeros(*rows.shape[:-1], shape.heads * shape.head_dim)
            return anatomy.finish_attention(layer, anatomy.project(layer, mixed)), readers
        if readers is written:
            rows = normed
        elif written.every:
            rows = readers.take(normed)  # type: ignore[arg-type]
        else:
            rows = norm(x.take(readers))
        query = run.rotate(layer, anatomy.query(layer, rows), readers)  # type: ignore[arg-type]
        query = readers.pad(query).transpose(1, 2)
        mask, some, causal = None, None, False
        sees = run.sees(layer, plan.sees)
        if readers is written and alone and sees is None:
            # Packed rows are in order and empty slots come last: the causal triangle is the whole mask.
            causal = readers.width > 1
        elif not (readers is written and readers.width == 1 and not holes and not readers.ragged and sees is None):
            at = run.memo(("index", id(readers)), lambda: _shifted(readers.index, run.start), readers)
            # Whoever reads every token sees at least itself, through any window.
            certain = written.every and plan.sees is None and not readers.ragged
            mask, some = run.visible(at, index, sees, certain=certain)
        if mask is not None and alone and written.every:
            mixed = torch.cat(
                [
                    self._core(
                        layer,
                        query[:, :, first:stop],
                        keys[:, :, :reach],
                        values[:, :, :reach],
                        mask[:, first:stop, :reach],
                        causal,
                    )
                    for first, stop, reach in readers.blocks()
                ],
                dim=1,
            )
        else:
            mixed = self._core(layer, query, keys, values, mask, causal)
        if some is not None and not (plan.sees is None and readers is written):
            mixed = torch.where(some, mixed, 0)
        out = anatomy.project(layer, readers.unpad(mixed))
        return anatomy.finish_attention(layer, out), readers

    def _normed(self, run: Pass, layer: int, x: Residual, plan: LayerPlan, written: Rows) -> Tensor:
        """Rows behind the layer's norm, packed. Pictures that no layer changes are normalised once; layers differ in weights."""
        norm, frozen = self.anatomy.attention_norm(layer), run.frozen
        rest = None if frozen is None or not self.anatomy.shares_norms else run.rows(run.changing(plan, frozen))
        if rest is None or rest is written or not written.every:
            return norm(x.take(written))
        if self._unit is None:
            self._unit = self.anatomy.unit_norm(x.whole())
        return rest.put(norm.weight * self._unit, norm(x.take(rest)), in_place=not torch.is_grad_enabled())

    def _beside(
        self,
        run: Pass,
        layer: int,
        x: Residual,
        readers: Rows,
        own: tuple[Tensor | None, Tensor | None, Tensor | None, bool],
        given: tuple[GivenKeys, ...],
        plan: LayerPlan,
        normed: Tensor | None,
    ) -> Tensor:
        """Attention over given keys and the rows' own: `[b q heads*head_dim]`."""
        anatomy = self.anatomy
        rows = anatomy.attention_norm(layer)(x.take(readers)) if normed is None else normed
        query = readers.pad(run.rotate(layer, anatomy.query(layer, rows), readers)).transpose(1, 2)
        (keys, values, index, holes), shape = own, run.state.ledger.shape.layers[layer]
        if keys is None or values is None or index is None:
            keys = values = query.new_zeros(query.shape[0], shape.kv_heads, 0, shape.head_dim)
            index = readers.index[:, :0]
        sees = run.sees(layer, plan.sees)
        at = run.memo(("index", id(readers)), lambda: _shifted(readers.index, run.start), readers)
        # One later token a row reads whatever there is.
        last = readers.width == 1 and not run.prefill and not holes and not readers.ragged and sees is None

        def may(group: GivenRows) -> tuple[Tensor | None, Tensor | None]:
            if last and not group.holes:
                return None, None
            query_at, key_at = run.memo(
                ("beside", id(at), id(index), id(group)),
                lambda: (group.of(at), torch.cat([group.index, group.of(index)], dim=1)),
                at,
                index,
                group,
            )
            return run.visible(query_at, key_at, sees)

        return attend_beside(
            query, keys, values, given, may=may, scaling=anatomy.scaling(layer), cap=anatomy.softcap(layer)
        )

    def _core(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool
    ) -> Tensor:
        """Softmax attention. query `[b heads q head_dim]`, keys and values `[b kv_heads s head_dim]` -> `[b q heads*head_dim]`."""
        anatomy = self.anatomy
        module = anatomy.attention(layer)
        scaling = anatomy.scaling(layer)
        dropout: float = module.attention_dropout if module.training else 0.0
        cap = anatomy.softcap(layer)
        if self._eager or cap is not None:
            if causal:
                q = torch.arange(query.shape[2], device=query.device)
                mask = (q[:, None] >= q)[None]
            bias = None
            # Families that cap nothing do not all take the argument; the fused kernels never do.
            extra = {} if cap is None else {"softcap": cap}
            if mask is not None:
                floor = torch.finfo(query.dtype).min
                bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, floor).unsqueeze(1)
            mixed, _ = anatomy.eager_attention(layer)(
                module, query, keys, values, bias, scaling=scaling, dropout=dropout, **extra
            )
            return mixed.flatten(2)
        groups = query.shape[1] // keys.shape[1]
        if groups > 1 and mask is not None and query.is_cuda:
            # The fast CUDA kernels take no mask together with grouped heads.
            keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
            groups = 1
        mixed = F.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=None if mask is None else mask.unsqueeze(1),
            dropout_p=dropout,
            is_causal=causal,
            scale=scaling,
            enable_gqa=groups > 1,
        )
        return mixed.transpose(1, 2).flatten(2)


def _shifted(index: Tensor, start: int) -> Tensor:
    """Indices among the new tokens -> original indices; empty slots stay -1."""
    return index if start == 0 else torch.where(index < 0, index, index + start)


def _weighted(branch: Tensor, weight: Tensor | None, rows: Rows) -> Tensor:
    return branch if weight is None else branch * rows.take(weight).unsqueeze(-1).to(branch.dtype)


def _refuse_gate_gradients(weight: Tensor | None) -> None:
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            'execute="gathered" cannot train gates: a skipped branch has no value to learn from; '
            'use execute="dense" to train routers, and torch.no_grad() where nothing trains'
        )


def _let_go(run: Pass, stored: RaggedLayer, layer: int) -> None:
    """Give up what lies before the window of this pass's first query. Now and then: finding it waits for the device."""
    window, index = run.state.ledger.shape.layers[layer].window, stored.index
    if window is None or index is None or index.shape[1] <= 2 * window or run.cache is None:
        return
    first = run.start - window + 1
    stored.take(*run.memo(("slots", id(index), first), lambda: kept_slots(index, index >= first), index))
    run.cache.held_from[layer] = first


def _check_freed(run: Pass, stored: RaggedLayer, freed: Tensor, plan: LayerPlan, layer: int) -> None:
    """A plan may not ask for a cached key that is gone; `Pass` keeps policies that only intersect from meaning that."""
    if len(run.policies) != 1 or stored.index is None:
        return
    readable = stored.readable(run.start)
    if run.cache is not None:
        # What the window let go was not hidden by a plan.
        readable[:, : run.cache.held_from[layer]] = True
    refuse_revival(freed, readable, run)


def refuse_revival(freed: Tensor, readable: Tensor, run: Pass) -> None:
    """Raise `ValueError` if `read` is true for a valid, undropped cached token that an earlier pass hid."""
    past: Any = run.alive(run.state.depth - 1)[:, : run.start]
    if bool((~freed & ~readable & past).any()):
        raise ValueError(
            "LayerPlan.read asks for a cached key that was freed or never stored; once read is False for a token it must stay so"
        )
