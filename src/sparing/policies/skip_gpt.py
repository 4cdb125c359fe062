"""SkipGPT: each token decides in every layer whether to run attention, and whether to run the MLP."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparing.plan import FULL, LayerPlan, ModelShape, Policy, View
from sparing.policies.gates import (
    check_probability,
    check_sizes,
    choose,
    device_of,
    linear,
    logits_of,
    matrix_flops,
    mean_gate,
    sample,
    sizes,
)


class SkipGPT(nn.Module, Policy):
    """Two routers a layer read the residual stream, before its norm; logit 0 executes, logit 1 skips.

    A token that skips attention keeps its residual; its key and value are computed and read all the same, in prefill
    and in decode. In eval mode the choice is deterministic. In training mode gates are hard Gumbel-softmax samples
    with a straight-through gradient, as weights on both branches: train on `execute="dense"`. Made in eval mode, like
    a loaded model.

    Args:
        hidden: width of the residual stream.
        depth: number of layers.
        router: `linear` (one matrix to two logits) or `mlp` (to a quarter of the width, ReLU, to two logits).
        feed_reads: what the MLP's router sees: `input`, the layer's input, so that both decisions fall before
            attention; or `residual`, the stream after attention.
        threshold: in eval mode, execute where P(execute) reaches this; 0.5 is the argmax.
        sample: in eval mode too, draw the gates at random (with `threshold` unused).
        generator: of all noise; the global one if `None`.

    Attributes:
        temperature: of the Gumbel-softmax's gradient; the paper anneals it from 5 to 1 in training.
        last_gates: in training mode, the mean gate of the latest pass by (layer, "attend" | "feed"), padding and
            dropped tokens left out; differentiable. In eval mode the run's ledger has it.

    Raises:
        ValueError: an unknown router or input, a threshold outside 0..1; (when applied) a model of other sizes.

    Paper: SkipGPT (2506.04179): `router="linear"`, r = W^T x; the gate multiplies the branch.
    Differs: the release has `router="mlp"` (its state dict does not fit the paper's router), and it samples in eval
        mode too, so its inference is random; `preset="release"` does both. It casts logits to the model's dtype, here
        they stay fp32; it averages gates over padding too; its temperature is a per-layer counter, here an attribute.
        `feed_reads="residual"` is a successor's (WIDE).
    """

    def __init__(
        self,
        hidden: int,
        depth: int,
        *,
        router: Literal["linear", "mlp"] = "linear",
        feed_reads: Literal["input", "residual"] = "input",
        threshold: float = 0.5,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if router not in ("linear", "mlp"):
            raise ValueError(f'SkipGPT(router={router!r}): choose "linear" (the paper) or "mlp" (the release)')
        if feed_reads not in ("input", "residual"):
            raise ValueError(f'SkipGPT(feed_reads={feed_reads!r}): choose "input" or "residual" (after attention)')
        check_probability(threshold, "SkipGPT(threshold)")
        self.hidden, self.depth, self.router, self.feed_reads = hidden, depth, router, feed_reads
        self.threshold, self.sample, self.generator = threshold, sample, generator
        self.temperature = 1.0
        self.last_gates: dict[tuple[int, str], Tensor] = {}
        self.attend = nn.ModuleList(_router(router, hidden) for _ in range(depth))
        self.feed = nn.ModuleList(_router(router, hidden) for _ in range(depth))
        self.eval()

    @classmethod
    def for_model(cls, model: nn.Module, preset: Literal["paper", "release"] = "paper", **arguments: Any) -> SkipGPT:
        """Fresh routers of a model's sizes, on its device.

        Args:
            model: a Hugging Face model.
            preset: `paper`: linear routers, deterministic in eval mode; `release`: MLP routers, sampled in eval mode.
            arguments: override the preset's.
        """
        if preset not in ("paper", "release"):
            raise ValueError(f'SkipGPT.for_model(preset={preset!r}): choose "paper" or "release"')
        chosen = {"router": "linear"} if preset == "paper" else {"router": "mlp", "sample": True}
        return cls(*sizes(model), **{**chosen, **arguments}).to(device_of(model))

    def validate(self, shape: ModelShape) -> None:
        """The routers must fit the model."""
        check_sizes("SkipGPT", (self.hidden, self.depth), (shape.hidden, shape.depth))

    def plan_attend(self, view: View) -> LayerPlan:
        """Attention, and the MLP too where its router reads the layer's input."""
        if view.layer == 0:
            self.last_gates = {}
        attend, attend_weight = self._gate(view, "attend")
        if self.feed_reads == "residual":
            return LayerPlan(attend=attend, attend_weight=attend_weight)
        feed, feed_weight = self._gate(view, "feed")
        return LayerPlan(attend=attend, feed=feed, attend_weight=attend_weight, feed_weight=feed_weight)

    def plan_feed(self, view: View) -> LayerPlan:
        """The MLP, where its router reads the residual after attention."""
        if self.feed_reads == "input":
            return FULL
        feed, feed_weight = self._gate(view, "feed")
        return LayerPlan(feed=feed, feed_weight=feed_weight)

    def mean_gate(self) -> Float[Tensor, ""]:
        """The share of modules that the latest training pass executed, over layers: for a sparsity loss.

        Raises:
            ValueError: no pass has run in training mode.
        """
        if not self.last_gates:
            raise ValueError("SkipGPT has no gates yet: run the model in training mode first (policy.train())")
        return torch.stack(list(self.last_gates.values())).mean()

    def _gate(self, view: View, module: str) -> tuple[Tensor, Tensor | None]:
        """`[b t]`, who executes, and in training the straight-through gate."""
        router = self.get_submodule(f"{module}.{view.layer}")
        logits = logits_of(router, view.residual)
        view.spend(logits.shape[0] * logits.shape[1] * matrix_flops(router))
        advantage = logits[..., 0] - logits[..., 1]
        if not self.training:
            if self.sample:
                return sample(advantage, 1.0, self.generator)[0], None
            return choose(advantage, self.threshold), None
        chosen, gate = sample(advantage, self.temperature, self.generator)
        self.last_gates[view.layer, module] = mean_gate(gate, view.alive()[:, -gate.shape[1] :])
        return chosen, gate

    def __repr__(self) -> str:
        """As constructed."""
        return (
            f"SkipGPT({self.hidden}, {self.depth}, router={self.router!r}, feed_reads={self.feed_reads!r}, "
            f"threshold={self.threshold:g}, sample={self.sample})"
        )


def _router(kind: str, hidden: int) -> nn.Module:
    if kind == "linear":
        return linear(hidden, 2, "linear")
    return nn.Sequential(linear(hidden, hidden // 4, "relu"), nn.ReLU(), linear(hidden // 4, 2, "linear"))
