"""The contract between those who decide (`Policy`) and those who carry it out (the executors, through a `View`)."""

from __future__ import annotations

import abc
from numbers import Integral
from typing import Any

from sparing.plan.arguments import kept_arguments
from sparing.plan.cost import ModelShape
from sparing.plan.layer_plan import FULL, LayerPlan
from sparing.plan.selection import Selection
from sparing.plan.views import PromptView, View
from sparing.tokens import Group, TokenMap


class Policy(abc.ABC):
    """Decides what is computed. One paper, one file; an `nn.Module` too where it learns.

    A policy with `causal = False` looks at later tokens to decide about earlier ones: it decides at prefill and is not asked
    again while decoding (what it hid stays hidden, new tokens run in full), unless it overrides `decodes`.
    """

    causal: bool = True
    ablation: bool = False
    """Whether this changes the result to learn from it (`sparing.ablate`): runs under `dense` only, marked in the ledger."""
    looks_back: bool = False
    """Whether `plan_feed` asks for this layer's `scores` (the executor then keeps the layer's input)."""
    by_layout: bool = False
    """Whether it decides by the `TokenMap` alone, so that prompts of one layout are planned alike (`sparing.apply(capture=True)`)."""
    freezes: tuple[Group, ...] = ()
    """Groups whose tokens run no branch in any layer: their keys and values are a function of what they came in as."""

    looks_at_encoder: tuple[int | float | None, ...] = ()
    """Layers of the vision encoder of which `start` asks for more than its output: numbers (negative from the end), shares of its
    depth, or `None` for the layer whose output is projected. The executor notes what enters these."""

    @property
    def decodes(self) -> bool:
        """Whether it is asked while decoding. Override where the rule for a decoded token is another one than at prefill."""
        return self.causal

    def selections(self) -> tuple[Selection, ...]:
        """Those that choose tokens for it, found among its attributes. The executor checks that they are for this model."""
        return tuple(value for value in vars(self).values() if isinstance(value, Selection))

    def validate(self, shape: ModelShape) -> None:
        """Raise `ValueError` if this policy cannot apply to a model of this shape. Nothing to check by default."""
        return

    def idle(self, tokens: TokenMap) -> bool:
        """Whether this policy leaves everything as it is for this prompt and what is decoded after it."""
        return False

    def start(self, view: PromptView) -> None:
        """Look at the prompt once. May drop tokens or rewrite embeddings; does nothing by default."""
        return

    def plan_attend(self, view: View) -> LayerPlan:
        """Plan a layer before its attention. May plan its MLP too."""
        return FULL

    def plan_feed(self, view: View) -> LayerPlan:
        """Plan a layer's MLP, after its attention. Only the MLP part of what is returned counts."""
        return FULL

    def unread(self, layer: int) -> bool:
        """Whether it is known beforehand that no picture token is read in a layer."""
        return False

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments that make this policy again, learned tensors aside: what `sparing.save` writes.

        They are read from the attributes of the same names; override it where there are none.

        Raises:
            ValueError: an argument is not kept as an attribute.
        """
        return kept_arguments(self)

    def picture_shares(self, depth: int) -> tuple[float, ...] | None:
        """Share of the picture tokens that each of `depth` layers computes; `None` where only a run tells.

        A run keeps whole numbers of tokens; this is what budgets are planned with (`sparing.policies.budget`).
        """
        return None

    def picture_reads(self, depth: int) -> tuple[float, ...] | None:
        """Share of the picture tokens whose keys each layer reads: those that it computes, where nothing else is said."""
        return self.picture_shares(depth)

    def conflict(self, other: Policy) -> str | None:
        """Why this policy contradicts `other`, and how to mend it; `None` if it does not."""
        return None

    def parts(self) -> tuple[Policy, ...]:
        """The policies this one is made of."""
        return (self,)

    def __and__(self, other: Policy) -> Composed:
        """Both policies: compute only what both ask for."""
        return Composed(*self.parts(), *other.parts())


class Composed(Policy):
    """Several policies at once; each token computes only what all of them ask for.

    Raises:
        ValueError: two of the policies contradict each other.
    """

    def __init__(self, *policies: Policy) -> None:
        self._parts = tuple(p for policy in policies for p in policy.parts())
        for i, a in enumerate(self._parts):
            for b in self._parts[i + 1 :]:
                if reason := a.conflict(b) or b.conflict(a):
                    raise ValueError(f"{type(a).__name__} & {type(b).__name__} contradict each other: {reason}")

    @property
    def causal(self) -> bool:  # type: ignore[override]
        """Whether every part is."""
        return all(p.causal for p in self._parts)

    @property
    def looks_back(self) -> bool:  # type: ignore[override]
        """Whether any part does."""
        return any(p.looks_back for p in self._parts)

    @property
    def looks_at_encoder(self) -> tuple[int | float | None, ...]:  # type: ignore[override]
        """The layers that any part looks at."""
        return tuple(layer for p in self._parts for layer in p.looks_at_encoder)

    def parts(self) -> tuple[Policy, ...]:
        """The policies this one is made of, in order."""
        return self._parts

    def __repr__(self) -> str:
        """`A() & B()`."""
        return " & ".join(map(repr, self._parts)) or "Composed()"


def check_layers(layers: Any, shape: ModelShape, what: str) -> None:
    """Refuse entries of `layers` that are no layer of the model.

    Raises:
        TypeError: one of them is no whole number.
        ValueError: the model has no such layer.
    """
    if strange := [i for i in layers if not isinstance(i, Integral)]:
        raise TypeError(f"{what}: expected layers as whole numbers, got {strange[0]!r}")
    if wrong := [i for i in layers if i not in range(shape.depth)]:
        raise ValueError(f"{what}: layer {wrong[0]} does not exist; this model has layers 0..{shape.depth - 1}")
