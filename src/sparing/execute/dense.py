"""The executor that defines the meaning: hooks on unmodified modules; gates multiply branch ends, masks hide keys. Slow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparing.anatomy import Anatomy
from sparing.anatomy.attention import Masks
from sparing.execute.gathered import refuse_revival
from sparing.execute.planning import Pass
from sparing.execute.visibility import capped
from sparing.plan import LayerPlan
from sparing.plan.layer_plan import Mask


class Dense:
    """Carries a plan out with hooks on a stock model. Differentiable, also in the gates.

    Args:
        anatomy: where the parts of the model are.

    Raises:
        ValueError: the model's attention function takes no mask of queries and keys.
    """

    name = "dense"
    ragged = False

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self._masks = anatomy.masks(exact=False)
        self.current: Pass | None = None
        self._plans: dict[int, LayerPlan] = {}
        self._inputs: dict[int, Tensor] = {}
        self._some: dict[int, Tensor | None] = {}
        self._handles: list[Any] = []

    def install(self) -> None:
        """Put the hooks on; they do nothing unless a planned pass is running."""
        a = self.anatomy

        def before_norm(_: nn.Module, args: Any) -> Any:
            return None if self.current is None else (self._added(self.current, len(a.layers) - 1, args[0]),)

        self._handles.append(a.decoder.norm.register_forward_pre_hook(before_norm))
        for i, layer in enumerate(a.layers):

            def before_layer(_: nn.Module, args: Any, kwargs: Any, i: int = i) -> Any:
                return self._before_layer(i, args, kwargs)

            def after_attention(_: nn.Module, __: Any, out: Any, i: int = i) -> Any:
                return self._gate(out, self._plans[i].attend, self._plans[i].attend_weight) if self.current else None

            def before_mlp(_: nn.Module, args: Any, i: int = i) -> None:
                self._before_mlp(i, args[0])

            def after_mlp(_: nn.Module, __: Any, out: Any, i: int = i) -> Any:
                return self._gate(out, self._plans[i].feed, self._plans[i].feed_weight) if self.current else None

            def before_projection(_: nn.Module, args: Any, i: int = i) -> Any:
                run = self.current
                if run is None:
                    return None
                mixed = args[0] if self._plans[i].zeroes is None else self._zeroed(run, i)
                some = self._some[i]
                mixed = mixed if some is None else torch.where(some, mixed, 0)
                return None if mixed is args[0] else (mixed, *args[1:])

            def after_layer(_: nn.Module, __: Any, out: Any, i: int = i) -> Any:
                return self._after_layer(i, out) if self.current else None

            self._handles += [
                layer.register_forward_pre_hook(before_layer, with_kwargs=True),
                # Before the hooks with which transformers collects hidden states.
                layer.register_forward_hook(after_layer, prepend=True),
                a.attention_end(i).register_forward_hook(after_attention),
                a.output_projection(i).register_forward_pre_hook(before_projection),
                a.mlp_norm(i).register_forward_pre_hook(before_mlp),
                a.mlp_end(i).register_forward_hook(after_mlp),
            ]

    def remove(self) -> None:
        """Take every hook off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.current = None

    def _before_layer(self, i: int, args: Any, kwargs: Any) -> Any:
        run = self.current
        if run is None:
            return None
        if i == 0:
            # Asked again: the model's attention can be changed between passes.
            self._masks = self.anatomy.masks(exact=False)
        x = before = args[0] if args else kwargs["hidden_states"]
        x = self._added(run, i - 1, x)
        if (kind := self.anatomy.rotary_kind(i)) is not None:
            run.rotary[kind] = kwargs["position_embeddings"]
        self._inputs[i] = x
        plan = self._plans[i] = run.plan_attend(i, lambda: x)
        if plan.rewrites is not None:
            x = self._inputs[i] = plan.rewrites(x)
        if x is not before:
            args, kwargs = (x, *args[1:]) if args else args, kwargs if args else {**kwargs, "hidden_states": x}
        self._some[i] = None
        mask = self._mask(run, i, plan)
        if mask is None:
            return None if x is before else (args, kwargs)
        may, some = mask
        self._some[i] = some
        if self._masks is Masks.ADDED:
            floor = torch.finfo(x.dtype).min
            bias = torch.zeros_like(may, dtype=x.dtype).masked_fill_(~may, floor)
            return args, {**kwargs, "attention_mask": bias.unsqueeze(1)}
        return args, {**kwargs, "attention_mask": may.unsqueeze(1)}

    @staticmethod
    def _added(run: Pass, i: int, x: Tensor) -> Tensor:
        """What a layer gave, with what the model adds to it."""
        addition = run.addition(i)
        if addition is None:
            return x
        where, features = addition
        return x.index_put(torch.nonzero(where, as_tuple=True), features.to(x), accumulate=True)

    def _mask(self, run: Pass, i: int, plan: LayerPlan) -> tuple[Tensor, Tensor] | None:
        """`[b t T]`, who may read whom, and `[b t 1]`, who may read anyone; `None` where the stock mask says it all."""
        state = run.state
        past = state.readable[i]
        freed = run.record.layers[i].freed
        before = state.tokens.valid[:, : run.start]
        if freed is not None:
            if len(run.policies) == 1:
                refuse_revival(freed, before if past is None else past, run)
            past = (before if past is None else past) & ~freed
        # Padding alone is hidden by the stock mask.
        hides = plan.read is not True and plan.read is not run.valid
        if not hides and past is None:
            readable = None
        else:
            readable = run.memo(
                ("readable", id(past), plan.read if isinstance(plan.read, bool) else id(plan.read)),
                lambda: torch.cat([before if past is None else past, self._as_tensor(run, plan.read)], dim=1),
                past,
                plan.read,
            )
        state.readable[i] = readable
        if readable is None and plan.sees is None:
            return None
        shown = state.tokens.valid if readable is None else readable
        sees = run.sees(i, plan.sees)

        def build() -> tuple[Tensor, Tensor]:
            b, length = shown.shape
            key = torch.arange(length, device=shown.device)
            query = key[run.start :].expand(b, -1)
            slots = torch.where(shown, key.expand(b, -1), -1)
            may, some = run.visible(query, slots, sees)
            assert some is not None
            return may, some

        return run.memo(("mask", id(readable), id(sees)), build, readable, sees)

    def _zeroed(self, run: Pass, i: int) -> Tensor:
        """What attention mixes when some weights are zeroed after the softmax: `[b t heads*head_dim]`, written out."""
        a, plan, state = self.anatomy, self._plans[i], run.state
        normed = a.attention_norm(i)(self._inputs[i])
        query = run.rotate(i, a.query(i, normed)).transpose(1, 2)
        if run.cache is None:
            keys = run.rotate(i, a.key(i, normed)).transpose(1, 2)
            values = a.value(i, normed).transpose(1, 2)
        else:
            stored: Any = run.cache.layers[i]
            keys, values = stored.keys, stored.values  # this pass's are in it already
        assert plan.zeroes is not None
        readable = state.readable[i]
        readable = state.tokens.valid if readable is None else readable
        index = torch.arange(readable.shape[1], device=readable.device)
        slots = torch.where(readable, index.expand_as(readable), -1)
        asking = index[run.start :].expand(len(readable), -1)
        may, _ = run.visible(asking, slots, run.sees(i, plan.sees))
        groups = query.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
        scores = capped((query @ keys.transpose(-1, -2)).float() * a.scaling(i), a.softcap(i))
        weights = scores.masked_fill(~may.unsqueeze(1), float("-inf")).softmax(-1)
        zeroed = plan.zeroes(asking.unsqueeze(2), slots.unsqueeze(1)).unsqueeze(1)
        return (weights.masked_fill(zeroed, 0).to(values.dtype) @ values).transpose(1, 2).flatten(2)

    def _before_mlp(self, i: int, x: Tensor) -> None:
        if self.current is not None:
            self._plans[i] = self.current.plan_feed(i, lambda: x, self._inputs[i], self._plans[i])

    def _after_layer(self, i: int, out: Any) -> Any:
        """Weight what the whole layer added."""
        before, weight = self._inputs.pop(i), self._plans[i].block_weight
        if weight is None:
            return None
        x = out[0] if isinstance(out, tuple) else out
        x = before + weight.unsqueeze(-1).to(x.dtype) * (x - before)
        return (x, *out[1:]) if isinstance(out, tuple) else x

    def _gate(self, out: Any, mask: Mask, weight: Tensor | None) -> Any:
        """Multiply a branch by its gate: by the weight where there is one (gradients pass), by the mask otherwise."""
        if mask is True and weight is None:
            return None
        branch = out[0] if isinstance(out, tuple) else out
        if weight is not None:
            gated = branch * weight.unsqueeze(-1).to(branch.dtype)
            # A straight-through gate learns from the branches that it leaves out; any other weight ends with its mask.
            if mask is not True and not weight.requires_grad:
                gated = (
                    torch.where(mask.unsqueeze(-1), gated, 0) if isinstance(mask, Tensor) else torch.zeros_like(branch)
                )
        elif isinstance(mask, Tensor):
            gated = torch.where(mask.unsqueeze(-1), branch, 0)
        else:
            gated = torch.zeros_like(branch)
        return (gated, *out[1:]) if isinstance(out, tuple) else gated

    @staticmethod
    def _as_tensor(run: Pass, mask: Mask) -> Tensor:
        if isinstance(mask, Tensor):
            return mask.expand(run.new.batch, -1)
        return torch.full((run.new.batch, run.new.length), mask, device=run.device)
