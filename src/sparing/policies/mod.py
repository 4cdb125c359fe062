"""Mixture-of-Depths: in each routed layer only the k tokens of a row that its router scores highest are computed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sparing.plan import FULL, LayerPlan, ModelShape, Policy, View
from sparing.plan.policy import check_layers
from sparing.policies.gates import check_sizes, device_of, logits_of, matrix_flops, sizes
from sparing.policies.ranking import order_of, share_of


class MoD(nn.Module, Policy):
    """A router scores every token from the residual stream, before its norm; the best k of a row run, times their score.

    k is `max(1, int(capacity * n))`, n the tokens of the row that are neither padding nor dropped. The choice among a
    prompt's tokens looks at all of them, so it is not causal; `decode` says what becomes of decoded tokens. Nothing
    here is random, and training mode is eval mode: routers learn through the score. Train on `execute="dense"`.

    Args:
        hidden: width of the residual stream.
        depth: number of layers.
        capacity: share of a row's tokens that runs.
        route: `modules`: one router for attention and one for the MLP, both reading the layer's input, keys and
            values of all tokens are read; `block`: one router a layer, and attention is among the chosen tokens alone
            (a token left out leaves no key there).
        select: `topk`: exactly k; `above`: those that score strictly above the k-th (k - 1 of them; one if k is 1).
        layers: the routed layers; all but the first and the last if `None`.
        decode: `full`: every decoded token runs, times its score; `threshold`: where it scores at least the router's
            calibrated threshold (see `calibrating`); `prompt`: at least what the k-th token of its own prompt scored.

    Attributes:
        thresholds: `[depth 2]`, for `decode="threshold"`: the score at which a decoded token runs, for attention (or
            the block) and for the MLP. NaN until calibrated.

    Raises:
        ValueError: a capacity outside 0..1, an unknown choice, a routed layer that does not exist; (when applied) a
            model of other sizes, or `decode="threshold"` without thresholds.

    Paper: Mixture-of-Depths (2404.02258), eq. 1, `preset="paper"`: blocks, exactly k, every second layer (from the
        paper as told by others: it was not at hand).
    Differs: its decoding (a predictor trained beside the router) is not offered: `prompt` and `threshold` need no
        training. `preset="release"` is `mod_twice` of LRM-Pruning (2601.18091): modules, strictly above. With
        a cache that code sees one token at a time, so k is 1 and all decoded tokens run at nominally any capacity:
        `decode="full"`, its preset. It counts padding in n, which is not done here.
    """

    causal = False

    def __init__(
        self,
        hidden: int,
        depth: int,
        *,
        capacity: float = 0.5,
        route: Literal["modules", "block"] = "modules",
        select: Literal["topk", "above"] = "topk",
        layers: Iterable[int] | None = None,
        decode: Literal["full", "threshold", "prompt"] = "full",
    ) -> None:
        super().__init__()
        if not 0 < capacity <= 1:
            raise ValueError(f"MoD(capacity={capacity}): the share of tokens that runs lies above 0 and at most at 1")
        for name, value, known in (
            ("route", route, ("modules", "block")),
            ("select", select, ("topk", "above")),
            ("decode", decode, ("full", "threshold", "prompt")),
        ):
            if value not in known:
                raise ValueError(f"MoD({name}={value!r}): choose one of {', '.join(known)}")
        self.hidden, self.depth, self.capacity = hidden, depth, capacity
        self.route, self.select, self.decode = route, select, decode
        self.layers = tuple(range(1, depth - 1)) if layers is None else tuple(sorted(set(layers)))
        wrong = [layer for layer in self.layers if not 0 <= layer < depth]
        if wrong or not self.layers:
            raise ValueError(f"MoD(layers={list(self.layers)}): name layers of 0..{depth - 1}, at least one")
        self._modules_routed = ("attend", "feed") if route == "modules" else ("attend",)
        self.routers = nn.ModuleDict(
            {f"{layer}_{module}": nn.Linear(hidden, 1) for layer in self.layers for module in self._modules_routed}
        )
        self.thresholds: Tensor
        self.register_buffer("thresholds", torch.full((depth, 2), math.nan))
        self._seen: dict[tuple[int, int], list[Tensor]] | None = None
        self.eval()

    @classmethod
    def for_model(cls, model: nn.Module, preset: Literal["paper", "release"] = "release", **arguments: Any) -> MoD:
        """Fresh routers of a model's sizes, on its device.

        Args:
            model: a Hugging Face model.
            preset: `paper`: one router a block, exactly k, every second layer; `release`: LRM-Pruning's `mod_twice`.
            arguments: override the preset's.
        """
        if preset not in ("paper", "release"):
            raise ValueError(f'MoD.for_model(preset={preset!r}): choose "paper" or "release"')
        hidden, depth = sizes(model)
        chosen: dict[str, Any] = {"route": "modules", "select": "above"}
        if preset == "paper":
            chosen = {"route": "block", "select": "topk", "layers": range(1, depth, 2), "decode": "prompt"}
        return cls(hidden, depth, **{**chosen, **arguments}).to(device_of(model))

    @property
    def decodes(self) -> bool:
        """Decoded tokens are scored one by one, though the choice among a prompt's is made together."""
        return True

    def validate(self, shape: ModelShape) -> None:
        """The routers must fit the model; thresholds must be there if they are needed."""
        check_sizes("MoD", (self.hidden, self.depth), (shape.hidden, shape.depth))
        check_layers(self.layers, shape, "MoD(layers=...)")
        routed = self.thresholds[list(self.layers), : len(self._modules_routed)]
        if self.decode == "threshold" and self._seen is None and bool(routed.isnan().any()):
            raise ValueError(
                'MoD(decode="threshold") has no thresholds: run some prompts inside `with policy.calibrating():` first'
            )

    @contextlib.contextmanager
    def calibrating(self) -> Iterator[None]:
        """Inside, note what the k-th token of each prompt scores; at the end, each router's mean is its threshold."""
        self._seen = {}
        try:
            yield
            if not self._seen:
                raise ValueError(
                    "MoD.calibrating: no prompt has run inside; call the model under sparing.apply(model, policy)"
                )
            for (layer, column), seen in self._seen.items():
                self.thresholds[layer, column] = torch.cat(seen).mean()
        finally:
            self._seen = None

    def plan_attend(self, view: View) -> LayerPlan:
        """Score, choose, and weight the branches or their sum."""
        if view.layer not in self.layers:
            return FULL
        b, t = view.residual.shape[:2]
        alive = view.alive()[:, -t:]
        masks, weights = [], []
        for column, module in enumerate(self._modules_routed):
            router = self.routers[f"{view.layer}_{module}"]
            score = logits_of(router, view.residual).squeeze(-1)
            view.spend(b * t * matrix_flops(router))
            chosen = (
                self._among_prompt(view, column, score, alive) if view.prefill else self._decoded(view, column, score)
            )
            masks.append(True if chosen is None else chosen)
            weights.append(score if chosen is None else torch.where(chosen, score, 0))
        attend, feed = masks[0], masks[-1]
        # A promise about the prompt's choice alone: it is the number of tokens that saves the wait for the device.
        bound = self._bound(t) if view.prefill else None
        if self.route == "block":
            # The score weighs the sum of both branches: the MLP reads x + attention, not x + score * attention.
            return LayerPlan(attend=attend, feed=feed, read=attend, block_weight=weights[0], capacity=bound)
        return LayerPlan(attend=attend, feed=feed, attend_weight=weights[0], feed_weight=weights[1], capacity=bound)

    def _bound(self, length: int) -> int:
        """The most tokens of a row of this length that run."""
        k = max(1, math.floor(length * self.capacity + 1e-9))
        return k if self.select == "topk" else max(1, k - 1)

    def _among_prompt(
        self, view: View, column: int, score: Float[Tensor, "b t"], alive: Bool[Tensor, "b t"]
    ) -> Bool[Tensor, "b t"]:
        """The best k of each row; remembers what the k-th scored."""
        k = share_of(alive, self.capacity).clamp(min=1).unsqueeze(1)
        place = order_of(score.detach(), alive)
        kth = score.detach().masked_fill((place != k - 1) | ~alive, float("-inf")).amax(1, keepdim=True)
        if self.decode == "prompt":
            view.state[f"{view.layer}_{column}"] = kth
        if self._seen is not None:
            self._seen.setdefault((view.layer, column), []).append(kth.flatten())
        if self.select == "topk":
            return alive & (place < k)
        return alive & torch.where(k == 1, place < 1, score.detach() > kth)

    def _decoded(self, view: View, column: int, score: Float[Tensor, "b t"]) -> Bool[Tensor, "b t"] | None:
        """Which decoded tokens run; `None` for all."""
        if self.decode == "full":
            return None
        limit = (
            self.thresholds[view.layer, column] if self.decode == "threshold" else view.state[f"{view.layer}_{column}"]
        )
        return score.detach() >= limit

    def __repr__(self) -> str:
        """As constructed."""
        return (
            f"MoD({self.hidden}, {self.depth}, capacity={self.capacity:g}, route={self.route!r}, "
            f"select={self.select!r}, layers={list(self.layers)}, decode={self.decode!r})"
        )
