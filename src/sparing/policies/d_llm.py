"""D-LLM: each token decides in every layer whether to run the whole of it; where it does not, it leaves no key."""

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


class DLLM(nn.Module, Policy):
    """One router a layer reads the residual stream, before its norm, and gates attention and MLP together.

    In eval mode the choice is deterministic. In training mode gates are hard Gumbel-softmax samples with a
    straight-through gradient: train on `execute="dense"`. Made in eval mode, like a loaded model.

    Args:
        hidden: width of the residual stream.
        depth: number of layers.
        router: `mlp` (to `width`, RMSNorm, SiLU, to two logits; logit 1 executes) or `linear` (to two logits; logit 0
            executes), as in the two released codes.
        width: of the MLP router.
        evict: a token that skips a layer leaves no key and value there; if not, both are computed and read all the
            same.
        start_layer: layers before it always run, and have no router.
        reserve: the first so many tokens of each row (padding not counted) always run.
        threshold: in eval mode, execute where P(execute) reaches this; 0.5 is the argmax.
        sample: in eval mode too, draw the gates at random.
        generator: of all noise; the global one if `None`.

    Attributes:
        temperature: of the Gumbel-softmax's gradient.
        last_gates: in training mode, the mean gate of the latest pass by layer, padding, dropped and reserved tokens
            left out; differentiable.

    Raises:
        ValueError: an unknown router, a threshold outside 0..1, a `start_layer` that leaves none to route; (when
            applied) a model of other sizes.

    Paper: D-LLM (NeurIPS 2024), "A Token Adaptive Computing Resource Allocation Strategy for Large Language Models".
        Confirmed in its released code: the router's form and initial bias (it begins by executing), fp32 routing, the
        first 2 layers and the first 2 tokens always run, eviction by hiding a skipped token's key, deterministic
        inference at P >= 0.5, Gumbel-softmax at temperature 1 in training. Not confirmed: the paper's own equations,
        which were not at hand.
    Differs: in training the release also passes a gradient through the hidden keys (it hides them after the softmax
        and normalises again, with 1e-6 in the sum) and gates the sum of both branches; here keys are hidden before
        the softmax without a gradient, and each branch has the gate. Values agree. `preset="lrm-pruning"` is that
        repository's baseline of the same name (2601.18091): linear router in every layer, no reserved tokens, no
        eviction, sampled in eval mode too.
    """

    def __init__(
        self,
        hidden: int,
        depth: int,
        *,
        router: Literal["mlp", "linear"] = "mlp",
        width: int = 512,
        evict: bool = True,
        start_layer: int = 2,
        reserve: int = 2,
        threshold: float = 0.5,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if router not in ("mlp", "linear"):
            raise ValueError(f'DLLM(router={router!r}): choose "mlp" (D-LLM) or "linear" (LRM-Pruning)')
        if not 0 <= start_layer < depth:
            raise ValueError(
                f"DLLM(start_layer={start_layer}) leaves nothing to route: this model has layers 0..{depth - 1}"
            )
        if reserve < 0:
            raise ValueError(f"DLLM(reserve={reserve}): give the number of first tokens that always run, 0 or more")
        check_probability(threshold, "DLLM(threshold)")
        self.hidden, self.depth, self.router, self.width = hidden, depth, router, width
        self.evict, self.start_layer, self.reserve = evict, start_layer, reserve
        self.threshold, self.sample, self.generator = threshold, sample, generator
        self.temperature = 1.0
        self.last_gates: dict[int, Tensor] = {}
        self.routers = nn.ModuleDict({str(i): self._router() for i in range(start_layer, depth)})
        self.eval()

    def _router(self) -> nn.Module:
        if self.router == "linear":
            return linear(self.hidden, 2, "linear")
        out = linear(self.width, 2)
        with torch.no_grad():
            out.bias.copy_(torch.tensor([0.1, 2.0]))
        return nn.Sequential(linear(self.hidden, self.width), nn.RMSNorm(self.width, eps=1e-5), nn.SiLU(), out)

    @classmethod
    def for_model(
        cls, model: nn.Module, preset: Literal["release", "lrm-pruning"] = "release", **arguments: Any
    ) -> DLLM:
        """Fresh routers of a model's sizes, on its device.

        Args:
            model: a Hugging Face model.
            preset: `release`: D-LLM's own; `lrm-pruning`: the baseline of that name in LRM-Pruning.
            arguments: override the preset's.
        """
        if preset not in ("release", "lrm-pruning"):
            raise ValueError(f'DLLM.for_model(preset={preset!r}): choose "release" or "lrm-pruning"')
        baseline = {"router": "linear", "evict": False, "start_layer": 0, "reserve": 0, "sample": True}
        chosen = baseline if preset == "lrm-pruning" else {}
        return cls(*sizes(model), **{**chosen, **arguments}).to(device_of(model))

    def validate(self, shape: ModelShape) -> None:
        """The routers must fit the model."""
        check_sizes("DLLM", (self.hidden, self.depth), (shape.hidden, shape.depth))

    def plan_attend(self, view: View) -> LayerPlan:
        """Both branches, and whether the key can be read."""
        if view.layer < self.start_layer:
            return FULL
        if view.layer == self.start_layer:
            self.last_gates = {}
        router = self.routers[str(view.layer)]
        logits = logits_of(router, view.residual)
        t = logits.shape[1]
        view.spend(logits.shape[0] * t * matrix_flops(router))
        skip, execute = (0, 1) if self.router == "mlp" else (1, 0)
        advantage = logits[..., execute] - logits[..., skip]
        gate: Tensor | None = None
        if self.training:
            chosen, gate = sample(advantage, self.temperature, self.generator)
        elif self.sample:
            chosen = sample(advantage, 1.0, self.generator)[0]
        else:
            chosen = choose(advantage, self.threshold)
        alive = view.alive()[:, -t:]
        if self.reserve:
            first = view.shared("reserved", lambda: (view.tokens.valid.long().cumsum(1) <= self.reserve)[:, -t:], self)
            chosen = chosen | first
            gate = None if gate is None else torch.where(first, 1.0, gate)
            alive = alive & ~first
        if gate is not None:
            self.last_gates[view.layer] = mean_gate(gate, alive)
        return LayerPlan(
            attend=chosen, feed=chosen, read=chosen if self.evict else True, attend_weight=gate, feed_weight=gate
        )

    def mean_gate(self) -> Float[Tensor, ""]:
        """The share of routed layers that the latest training pass executed: for a sparsity loss.

        Raises:
            ValueError: no pass has run in training mode.
        """
        if not self.last_gates:
            raise ValueError("DLLM has no gates yet: run the model in training mode first (policy.train())")
        return torch.stack(list(self.last_gates.values())).mean()

    def __repr__(self) -> str:
        """As constructed."""
        return (
            f"DLLM({self.hidden}, {self.depth}, router={self.router!r}, evict={self.evict}, "
            f"start_layer={self.start_layer}, reserve={self.reserve}, threshold={self.threshold:g}, sample={self.sample})"
        )
