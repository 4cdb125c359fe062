"""Knock out attention edges between groups of tokens, or between tokens of classes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from sparing.ablate.places import named
from sparing.plan import LayerPlan, ModelShape, Policy, PromptView, Selection, View
from sparing.plan.layer_plan import Sees
from sparing.plan.policy import check_layers
from sparing.plan.selection import chosen_in, remembered
from sparing.tokens import Group


class _KnockOut(Policy):
    """See `knock_out`."""

    ablation = True

    def __init__(
        self,
        queries: tuple[Group, ...] | Selection,
        keys: tuple[Group, ...] | Selection,
        layers: frozenset[int] | None,
        renormalise: bool,
    ) -> None:
        self.queries, self.keys, self.layers, self.renormalise = queries, keys, layers, renormalise

    def validate(self, shape: ModelShape) -> None:
        """Every named layer must exist."""
        check_layers(sorted(self.layers or ()), shape, "knock_out(layers=...)")

    def start(self, view: PromptView) -> None:
        """Selections decide once."""
        for name, where in (("queries", self.queries), ("keys", self.keys)):
            if isinstance(where, Selection):
                view.state[name] = chosen_in(view, where)

    def plan_attend(self, view: View) -> LayerPlan:
        """The edges as a mask over original indices."""
        if self.layers is not None and view.layer not in self.layers:
            return LayerPlan()
        of_query, of_key = self._tokens(view, "queries"), self._tokens(view, "keys")
        if of_query is None or of_key is None:
            return LayerPlan()

        def edge(query: Tensor, key: Tensor) -> Tensor:
            b = of_query.shape[0]
            q, k = (i.clamp(min=0).expand(b, *i.shape[1:]) for i in (query, key))
            hit_q = of_query.gather(1, q.flatten(1)).view(q.shape)
            return hit_q & of_key.gather(1, k.flatten(1)).view(k.shape)

        hidden: Sees = lambda query, key: ~edge(query, key)  # noqa: E731
        return LayerPlan(sees=hidden) if self.renormalise else LayerPlan(zeroes=edge)

    def _tokens(self, view: View, name: str) -> Tensor | None:
        where = self.queries if name == "queries" else self.keys
        return remembered(view, name) if isinstance(where, Selection) else view.tokens.of(*where)

    def __repr__(self) -> str:
        """As called."""
        q, k = (named(where) for where in (self.queries, self.keys))
        return f"knock_out({q} -> {k}, layers={self.layers and sorted(self.layers)}, renormalise={self.renormalise})"


def knock_out(
    queries: Iterable[Group] | Group | Selection,
    keys: Iterable[Group] | Group | Selection,
    *,
    layers: Iterable[int] | None = None,
    renormalise: bool = False,
) -> Policy:
    """Cut the attention edges from some tokens to others.

    The result goes into `sparing.apply` like a policy, under `execute="dense"`.

    Args:
        queries: the groups that lose sight, or a `Selection` (tokens of a class: `OfClass`; decoded tokens are never in one).
        keys: the groups that they no longer see (themselves too, where a token belongs to both), or a `Selection`.
        layers: in these layers; in all of them if `None`.
        renormalise: `False` sets the weights to zero after the softmax, so the rest sums to less than one; `True` hides the keys
            before it, as every plan does.

    Raises:
        ValueError: (when applied) a layer that does not exist, or an executor other than `dense`.

    Paper: EmbedLens (2603.00510), `attn_skipping_method` "vv" (image, image) and "vt" (text, image): after the softmax, without
        renormalising.
    """
    ask, asked = (
        (where,) if isinstance(where, Group) else where if isinstance(where, Selection) else tuple(where)
        for where in (queries, keys)
    )
    return _KnockOut(ask, asked, None if layers is None else frozenset(layers), renormalise)
