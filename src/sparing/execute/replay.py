"""Note what policies decide while a prompt is decoded, and repeat those decisions in one full forward pass."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from sparing.plan import LayerPlan, Ledger, ModelShape, Policy, PromptView, View
from sparing.plan.layer_plan import Rewrites
from sparing.tokens import TokenMap

WEIGHTS = ("attend", "feed", "block")


class Recorder(Policy):
    """Decides as `inner` does, and notes what the ledger does not: branch weights, rewritten states, promised capacities, the map.

    Attributes:
        weights: weights by (first index of the pass, layer, "attend" | "feed" | "block").
        rewrites: what rewrites a layer's input, by (first index of the pass, number of its tokens, layer).
        embeds: `[b t d]`, the prompt's embeddings, where they were rewritten.
        capacities: every promise made.
        tokens: the map of all tokens so far.
    """

    def __init__(self, inner: Policy) -> None:
        self.inner = inner
        self.weights: dict[tuple[int, int, str], Tensor] = {}
        self.rewrites: dict[tuple[int, int, int], Rewrites] = {}
        self.embeds: Tensor | None = None
        self.capacities: list[int] = []
        self.tokens: TokenMap | None = None

    @property
    def causal(self) -> bool:  # type: ignore[override]
        """As `inner`."""
        return self.inner.causal

    @property
    def decodes(self) -> bool:
        """As `inner`."""
        return self.inner.decodes

    @property
    def looks_back(self) -> bool:  # type: ignore[override]
        """As `inner`."""
        return self.inner.looks_back

    @property
    def looks_at_encoder(self) -> tuple[int | float | None, ...]:  # type: ignore[override]
        """As `inner`."""
        return self.inner.looks_at_encoder

    def validate(self, shape: ModelShape) -> None:
        """As `inner`."""
        self.inner.validate(shape)

    def idle(self, tokens: TokenMap) -> bool:
        """As `inner`."""
        return self.inner.idle(tokens)

    def start(self, view: PromptView) -> None:
        """As `inner`; rewritten embeddings are noted."""
        before = view.embeds
        self.inner.start(view)
        if view.embeds is not before:
            self.embeds = view.embeds.detach()

    def plan_attend(self, view: View) -> LayerPlan:
        """As `inner`, noted."""
        return self._note(view, self.inner.plan_attend(view))

    def plan_feed(self, view: View) -> LayerPlan:
        """As `inner`, noted."""
        return self._note(view, self.inner.plan_feed(view))

    def _note(self, view: View, plan: LayerPlan) -> LayerPlan:
        start = view.tokens.length - view.new.length
        for name in WEIGHTS:
            weight = getattr(plan, f"{name}_weight")
            if weight is not None:
                at = (start, view.layer, name)
                self.weights[at] = weight.detach() * self.weights.get(at, torch.ones(()))
        if plan.rewrites is not None:
            self.rewrites[start, view.new.length, view.layer] = plan.rewrites
        if plan.capacity is not None:
            self.capacities.append(plan.capacity)
        return plan


class Replay(Policy):
    """What a ledger says was computed and read, pass by pass, as plans for all of its tokens at once.

    Args:
        ledger: of a run without beams.
        recorders: what its policies were wrapped in.
    """

    def __init__(self, ledger: Ledger, recorders: list[Recorder]) -> None:
        depth = ledger.shape.depth
        self.attend = [ledger.attend(layer) for layer in range(depth)]
        self.feed = [ledger.feed(layer) for layer in range(depth)]
        self.may = [readable_pairs(ledger, layer) for layer in range(depth)]
        self._weights = [{name: _weight(ledger, recorders, layer, name) for name in WEIGHTS} for layer in range(depth)]
        self._embeds = next((r.embeds for r in reversed(recorders) if r.embeds is not None), None)
        self._rewrites = [noted for recorder in recorders for noted in recorder.rewrites.items()]

    def start(self, view: PromptView) -> None:
        """The prompt's embeddings, as they were left."""
        if self._embeds is not None:
            view.embeds = torch.cat([self._embeds, view.embeds[:, self._embeds.shape[1] :]], dim=1)

    def plan_attend(self, view: View) -> LayerPlan:
        """One layer, as it was."""
        layer, device = view.layer, view.residual.device
        may = self.may[layer].to(device)
        rows = torch.arange(len(may), device=device)[:, None, None]

        def sees(query: Tensor, key: Tensor) -> Tensor:
            return may[rows, query.clamp(min=0), key.clamp(min=0)]

        attend, feed = self.attend[layer].to(device), self.feed[layer].to(device)
        weights: dict[str, Any] = {}
        for name, mask in (("attend", attend), ("feed", feed), ("block", torch.ones_like(attend))):
            weight = self._weights[layer][name]
            weights[f"{name}_weight"] = None if weight is None else weight.to(device) * mask
        rewrites = [(start, n, change) for (start, n, at), change in self._rewrites if at == layer]
        return LayerPlan(
            attend=attend,
            feed=feed,
            sees=sees,
            rewrites=(lambda states: _rewritten(states, rewrites)) if rewrites else None,
            **weights,
        )


def _rewritten(states: Tensor, rewrites: list[tuple[int, int, Rewrites]]) -> Tensor:
    """The tokens of each pass rewritten as they were then."""
    for start, number, change in rewrites:
        behind = states[:, start + number :]
        states = torch.cat([states[:, :start], change(states[:, start : start + number]), behind], dim=1)
    return states


def _weight(ledger: Ledger, recorders: list[Recorder], layer: int, name: str) -> Tensor | None:
    """`[b T]`, the product of the recorders' weights on a branch; `None` if there were none."""
    out: Tensor | None = None
    for recorder in recorders:
        for (start, at, which), weight in recorder.weights.items():
            if (at, which) == (layer, name):
                if out is None:
                    out = torch.ones(ledger.passes[0].batch, ledger.length)
                out[:, start : start + weight.shape[1]] *= weight.cpu()
    return out


def readable_pairs(ledger: Ledger, layer: int) -> Bool[Tensor, "b T T"]:
    """Which query could read which key in a layer, when the query was new."""
    length, batch = ledger.length, ledger.passes[0].batch
    may = torch.zeros(batch, length, length, dtype=torch.bool)
    window = ledger.shape.layers[layer].window
    key = torch.arange(length)
    kept = torch.zeros(batch, length, dtype=torch.bool)
    written = ledger.read(layer)
    for p in ledger.passes:
        record = p.layers[layer]
        new = slice(p.start, p.start + p.length)
        if record.freed is not None:
            kept[:, : p.start] &= ~record.freed.cpu()
        kept[:, new] = written[:, new]
        block = kept[:, None] & (key <= key[new, None])
        if window is not None:
            block = block & (key[new, None] - key < window)
        if record.sees is not None:
            block = block & record.sees(key[None, new, None], key[None, None]).cpu()
        may[:, new] = block
    return may
