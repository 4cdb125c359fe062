"""`choose_layers`: in which few layers text has to read a picture that nothing else is computed for (ViCA)."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sparing.ablate import knock_out
from sparing.anatomy import Anatomy, anatomy_of
from sparing.evaluate.kinds import IMAGE
from sparing.evaluate.loss import explain_not_finite
from sparing.evaluate.measurements import Measurements, content_key
from sparing.evaluate.pictures.material import PictureMaterial
from sparing.evaluate.removal import Removal
from sparing.execute import apply
from sparing.lens import module_changes
from sparing.policies import ViCA
from sparing.tokens import Group, TokenMap

Criterion = Literal["greedy", "kl", "cosine"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
Placing = Literal["random", "first", "last", "uniform"]
PLACINGS: tuple[Placing, ...] = get_args(Placing)
GROUPS = {"text": Group.TEXT, "image": Group.IMAGE}
Progress = Callable[[float, str], None]


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much may be read: a number of layers, or a share of what the dense model computes for pictures.

    Attributes:
        layers: how many layers.
        share: of the dense decoder's operations on image tokens.
    """

    layers: int | None = None
    share: float | None = None

    @classmethod
    def of(cls, text: str | int) -> Budget:
        """`4` (layers), or `5%` of the visual operations.

        Raises:
            ValueError: neither of them.
        """
        words = str(text).strip()
        try:
            if words.endswith("%"):
                share = float(words[:-1]) / 100
                if 0 < share <= 1:
                    return cls(share=share)
            elif int(words) >= 0:
                return cls(layers=int(words))
        except ValueError:
            pass
        raise ValueError(
            f"a budget of {text!r} is neither a number of layers (4) nor a share of the visual FLOPs above 0% (5%)"
        )

    def __str__(self) -> str:
        """As it was written."""
        return f"{self.layers}" if self.share is None else f"{100 * self.share:g}%"


@dataclasses.dataclass(frozen=True)
class LayerChoice:
    """Reading layers, and why these.

    Attributes:
        layers: in ascending order.
        order: as they were chosen, the most wanted first.
        by: the criterion, or how they were placed.
        budget: as it was written.
        prefix: of the `ViCA` they are for.
        share: operations that this ViCA spends on pictures, as a share of the dense model's.
        scores: criterion -> a score a layer; the higher the more wanted.
        cosine: group and module -> mean cosine of the residual stream before and after it, a layer.
        steps: the greedy search: after each layer that was taken, the loss on the choosing half; the first is without any.
        about: how much was looked at.
    """

    layers: tuple[int, ...]
    order: tuple[int, ...]
    by: str
    budget: str
    prefix: str | int
    share: float
    scores: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    cosine: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    steps: Sequence[float] = ()
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def policy(self) -> ViCA:
        """The policy; blind where a budget of 0 layers was asked for."""
        return ViCA(self.layers, self.prefix, blind=not self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return dataclasses.asdict(self)


class VisualCost:
    """Counts what a choice of reading layers spends on pictures, on all prompts of a material, as the ledger does.

    Visual operations are those of the prefill that are not there when the pictures are away: the vision encoder, the output matrix
    and what text computes for itself are in none of them.

    Args:
        material: the prompts.

    Paper: ViCA (2602.07574) speaks of 4% of the visual operations of LLaVA-1.5-7B with 8 layers of 32.
    """

    def __init__(self, material: PictureMaterial) -> None:
        self._flops, self.depth = material.flops, material.shape.depth
        self._text = self._flops(Removal().entering(IMAGE, self.depth))
        self.dense = self._flops.dense - self._text

    def share(self, layers: Sequence[int]) -> float:
        """Of the dense model's visual operations."""
        return (self._flops(Removal.reading(layers, self.depth)) - self._text) / self.dense

    def fits(self, layers: Sequence[int], budget: Budget) -> bool:
        """Whether a choice keeps to a budget."""
        if budget.layers is not None:
            return len(layers) <= budget.layers
        assert budget.share is not None
        return self.share(layers) <= budget.share


def choose_layers(
    material: PictureMaterial,
    by: Criterion | Placing = "greedy",
    budget: Budget = Budget(share=0.05),
    *,
    prefix: str | int = "update",
    seed: int = 0,
    store: Measurements | None = None,
    on_step: Progress | None = None,
) -> LayerChoice:
    """Choose the layers in which text reads the pictures, within a budget.

    Only the choosing half of the material is looked at; the other half is there to report what the choice costs.

    - `cosine`: layers whose attention turns text tokens most (1 - cosine before and after it). One pass of the stock model.
    - `kl`: layers where the output distribution changes most when text stops reading pictures in that layer alone, everything else
      as it was: KL(stock, without), mean nats an answer's token. The stock model's pass, and one a layer, batch by batch. Cosines are
      taken in the same pass.
    - `greedy`: layers added one by one, each time the one that leaves the lowest loss of the answers: ViCA itself is run, with visual
      tokens frozen. At most `depth` passes for every layer of the budget, each of them cheap.
    - `random`, `first`, `last`, `uniform`: as many layers without looking, the controls.

    Equal scores: the earlier layer. A budget is used up, even where another layer no longer helps.

    Args:
        material: the model, and questions about pictures, with all answers known (`ready`).
        by: the criterion.
        budget: how many layers, or what share of the visual operations.
        prefix: as in `ViCA`; `greedy` measures with it.
        seed: of `random`.
        store: keeps measurements, so that an interrupted choice goes on.
        on_step: is told the share that is done, and a line.

    Raises:
        ValueError: an unknown criterion; a budget that holds no layer, or more than there are; logits that are not finite.

    Paper: ViCA (2602.07574) chose its layers by cosines and by KL. Differs: it released no code for the choice. That the cosine
        counts text tokens around attention, how KL is averaged, and the greedy search are ours.
    """
    cost = VisualCost(material)
    chooser = _Chooser(material, cost, budget, prefix, store, on_step or (lambda done, line: None))
    chooser.check()
    if by in PLACINGS:
        number = budget.layers
        if number is None:
            # What is placed without looking is as many as fit in order of the layers.
            number = len(chooser.filled(range(cost.depth)))
        order: tuple[int, ...] = placed_layers(cost.depth, number, by, seed)
        return chooser.choice(by, order)
    if by == "greedy":
        return chooser.greedy()
    if by in CRITERIA:
        return chooser.ranked(by)
    raise ValueError(f"layers are chosen by {', '.join((*CRITERIA, *PLACINGS))}, not by {by!r}")


def placed_layers(depth: int, number: int, how: Placing, seed: int = 0) -> tuple[int, ...]:
    """So many layers of a model without looking at it: at its beginning, its end, evenly, or drawn at random."""
    if how == "first":
        return tuple(range(number))
    if how == "last":
        return tuple(range(depth - number, depth))
    if how == "uniform":
        return tuple(int((2 * i + 1) * depth / (2 * number)) for i in range(number))
    return tuple(sorted(random.Random(seed).sample(range(depth), number)))


def added_features(anatomy: Anatomy) -> str | None:
    """What ViCA means where a model adds visual features between layers; `None` where it adds none."""
    if not (after := anatomy.added_after):
        return None
    return (
        f"{anatomy.config.model_type} adds features of its encoder to the visual tokens after layers "
        f"{', '.join(map(str, after))}: they are added under ViCA too, at no cost in the decoder, so a layer reads the projector's "
        "output and what was added before it"
    )


class _Chooser:
    """One choice under way."""

    def __init__(
        self,
        material: PictureMaterial,
        cost: VisualCost,
        budget: Budget,
        prefix: str | int,
        store: Measurements | None,
        tell: Progress,
    ) -> None:
        self.material, self.cost, self.budget, self.prefix, self.tell = material, cost, budget, prefix, tell
        self.store = store or Measurements(None, "")
        self.depth = cost.depth

    def check(self) -> None:
        """Refuse a budget that nothing fits into, or that is larger than the model."""
        if self.budget.layers is not None and self.budget.layers > self.depth:
            raise ValueError(f"a budget of {self.budget} layers is more than the model's {self.depth}: give fewer")
        if self.budget.share is not None:
            least = min(self.cost.share([layer]) for layer in range(self.depth))
            if least > self.budget.share:
                raise ValueError(
                    f"a budget of {self.budget} holds no layer, so the model would be blind: reading pictures in one layer takes "
                    f"{100 * least:.2g}% of the visual FLOPs"
                )

    def filled(self, order: Sequence[int]) -> tuple[int, ...]:
        """The layers of an order that fit into the budget together."""
        taken: list[int] = []
        for layer in order:
            if self.cost.fits([*taken, layer], self.budget):
                taken.append(layer)
        return tuple(taken)

    def choice(self, by: str, order: Sequence[int], **more: Any) -> LayerChoice:
        """The result."""
        layers = tuple(sorted(order))
        about = {"questions": len(self.material.asked("choose")), "visual_flops": self.cost.dense}
        share = self.cost.share(layers) if layers else 0.0
        return LayerChoice(layers, tuple(order), by, str(self.budget), self.prefix, share, about=about, **more)

    def ranked(self, by: Literal["kl", "cosine"]) -> LayerChoice:
        """By scores of single layers."""
        cosine, kl = self._calibrated(with_kl=by == "kl")
        scores = {"cosine": [1 - value for value in cosine["text attention"]]}
        if kl is not None:
            scores = {"kl": kl, **scores}
        order = sorted(range(self.depth), key=lambda layer: (-scores[by][layer], layer))
        return self.choice(by, self.filled(order), scores=scores, cosine=cosine)

    def greedy(self) -> LayerChoice:
        """Layer by layer."""
        cosine, _ = self._calibrated(with_kl=False)
        taken: list[int] = []
        gains = [0.0] * self.depth
        steps = [self._loss(taken)]
        while True:
            left = [i for i in range(self.depth) if i not in taken and self.cost.fits([*taken, i], self.budget)]
            if not left:
                break
            losses = {}
            for i, layer in enumerate(left):
                losses[layer] = self._loss([*taken, layer])
                gains[layer] = steps[-1] - losses[layer]
                self.tell(
                    (i + 1) / len(left), f"layer {len(taken) + 1}: reading in {layer} too, loss {losses[layer]:.4f}"
                )
            best = min(left, key=lambda layer: (losses[layer], layer))
            taken.append(best)
            steps.append(losses[best])
        scores = {"greedy": gains, "cosine": [1 - value for value in cosine["text attention"]]}
        return self.choice("greedy", taken, scores=scores, cosine=cosine, steps=steps)

    def _loss(self, layers: Sequence[int]) -> float:
        policy = ViCA(sorted(layers), self.prefix, blind=not layers)
        name = f"choose | {policy!r}"
        return self.store.get(name, lambda: {"loss": self.material.loss_under("choose", policy).mean})["loss"]

    def _calibrated(self, *, with_kl: bool) -> tuple[dict[str, list[float]], list[float] | None]:
        """Cosines, and the KL of each layer where asked for: the clean logits of a batch are kept for its other passes only."""
        batches = list(self.material.batches("choose"))
        kinds = [f"{group} {module}" for group in GROUPS for module in ("attention", "mlp")]
        totals = torch.zeros(len(kinds) + 1, self.depth, dtype=torch.float64)
        weights = torch.zeros(len(kinds) + 1, 1, dtype=torch.float64)
        for i, batch in enumerate(batches):
            name = f"calibration {'with' if with_kl else 'without'} kl, batch {i} of {len(batches)}"
            found = self.store.get(name, lambda batch=batch: self._pass(batch, with_kl))
            totals += torch.tensor(found["sums"], dtype=torch.float64)
            weights += torch.tensor(found["counts"], dtype=torch.float64)[:, None]
            self.tell((i + 1) / len(batches), f"calibration, batch {i + 1} of {len(batches)}")
        means = totals / weights.clamp(min=1)
        return dict(zip(kinds, means[:-1].tolist(), strict=True)), means[-1].tolist() if with_kl else None

    @torch.inference_mode()
    def _pass(self, batch: Any, with_kl: bool) -> dict[str, Any]:
        """Sums over one batch: cosines by group and module, and last the KL of every layer; and how many tokens they are over."""
        model = self.material.model
        tokens = TokenMap.from_inputs(model, batch.inputs)
        with module_changes(model, list(GROUPS.values())) as changes, changes.of(tokens):
            clean = _log_probabilities(model, batch)
        if not bool(torch.isfinite(clean).all()):
            raise ValueError(explain_not_finite(model, batch))
        counts = [float(tokens.of(group).sum()) for group in GROUPS.values() for _ in range(2)]
        means = [changes.cosine(group, module) for group in GROUPS.values() for module in ("attention", "mlp")]
        sums = [(mean.nan_to_num() * count).tolist() for mean, count in zip(means, counts, strict=True)]
        kl = [0.0] * self.depth
        for layer in range(self.depth) if with_kl else ():
            cut = knock_out(Group.TEXT, Group.IMAGE, layers=[layer], renormalise=True)
            with apply(model, cut, execute="dense"):
                changed = _log_probabilities(model, batch)
            kl[layer] = float((clean.exp() * (clean - changed)).sum(-1).sum(dtype=torch.float64))
        return {"sums": [*sums, kl], "counts": [*counts, float(len(clean))]}


def _log_probabilities(model: Any, batch: Any) -> Float[Tensor, "n vocabulary"]:
    """Of the scored tokens of a batch."""
    logits = model(**batch.inputs, use_cache=False).logits[:, :-1]
    return logits[batch.scored].float().log_softmax(-1)


def measurements_of(material: PictureMaterial, path: Any = None) -> Measurements:
    """Where the measurements of a material are kept; in memory without a path."""
    subject = content_key(material.model, *material.content, str(material.device), torch.__version__)
    return Measurements(path, subject)


def check_sees(model: Any) -> None:
    """Refuse a model without pictures.

    Raises:
        ValueError: see above.
    """
    anatomy = anatomy_of(model)
    if anatomy.vision_encoder is None:
        raise ValueError(
            f"ViCA is about how text reads pictures, and {anatomy.config.model_type} reads text alone: name a vision-language model"
        )
