"""What ablations share that rewrite what chosen tokens of the prompt hold, before the first layer or before a later one."""

from __future__ import annotations

import abc

import torch
from jaxtyping import Float
from torch import Tensor

from sparing.plan import FULL, LayerPlan, ModelShape, Policy, PromptView, View
from sparing.plan.policy import check_layers


class Rewrite(Policy):
    """Replaces what the prompt holds at the input of one layer.

    Before the first layer it rewrites the embeddings, so what comes after it in a composition sees them rewritten: put
    policies whose selections should see the prompt as it was in front.

    Args:
        layer: at whose input.
    """

    ablation = True
    causal = False

    def __init__(self, layer: int) -> None:
        self.layer = layer

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """As it is called."""

    @abc.abstractmethod
    def settle(self, view: PromptView) -> dict[str, Tensor]:
        """What to do in this prompt: tensors with the batch first, so that they follow beams."""

    @abc.abstractmethod
    def rewritten(self, states: Float[Tensor, "b t d"], settled: dict[str, Tensor]) -> Float[Tensor, "b t d"]:
        """The states, rewritten."""

    def validate(self, shape: ModelShape) -> None:
        """The layer must exist."""
        check_layers([self.layer], shape, f"{self.name}(layer=...)")

    def start(self, view: PromptView) -> None:
        """Decide once; at the first layer's input, rewrite too."""
        settled = self.settle(view)
        if self.layer == 0:
            view.embeds = self.rewritten(view.embeds, settled)
        else:
            view.state.update(settled)

    def plan_attend(self, view: View) -> LayerPlan:
        """At a later layer's input, rewrite."""
        if not self.layer or view.layer != self.layer or not view.prefill or not view.state:
            return FULL
        settled = {name: value for name, value in view.state.items() if isinstance(value, Tensor)}
        return LayerPlan(rewrites=lambda states: self.rewritten(states, settled))


def at_layer(layer: int) -> str:
    """For a `repr`."""
    return f", layer={layer}" if layer else ""


def where_true(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` where the mask `[b t]` says so."""
    return torch.where(mask.unsqueeze(-1), new.to(old.dtype), old)
