"""The contract between those who decide (`Policy`) and those who carry it out (the executors, through a `View`)."""

from __future__ import annotations

import abc
import inspect
from collections.abc import Callable
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sparing.plan.cost import ModelShape
from sparing.plan.layer_plan import FULL, LayerPlan
from sparing.tokens import TokenMap


class View(abc.ABC):
    """What a policy may look at in one layer of one forward pass. `t` is the number of new tokens, `T` of all so far."""

    layer: int
    shape: ModelShape
    tokens: TokenMap
    """All tokens so far, `[b T]`."""
    new: TokenMap
    """The tokens of this forward pass, `[b t]`."""
    state: dict[str, Any]
    """This policy's own memory for this run. Tensors in it have the batch first, and are reordered with beams."""

    @property
    @abc.abstractmethod
    def residual(self) -> Float[Tensor, "b t d"]:
        """The residual stream: the layer's input in `plan_attend`, the sum with attention in `plan_feed`.

        Do not write to it, and clone what you keep beyond this call: its memory is used again.
        """

    @property
    @abc.abstractmethod
    def prefill(self) -> bool:
        """Whether this pass reads the prompt (nothing is cached yet)."""

    @property
    @abc.abstractmethod
    def prompt_length(self) -> int:
        """Number of tokens of the prompt, padding included."""

    @abc.abstractmethod
    def normed(self) -> Float[Tensor, "b t d"]:
        """The residual after this branch's norm: what attention reads in `plan_attend`, the MLP in `plan_feed`."""

    @abc.abstractmethod
    def alive(self) -> Bool[Tensor, "b T"]:
        """Which tokens are neither padding nor dropped."""

    @abc.abstractmethod
    def scores(
        self, queries: Int[Tensor, "b q"], keys: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b heads q k"]:
        """This layer's attention probabilities for chosen queries, over every key that is alive and readable.

        Args:
            queries: indices among the new tokens, `0..t-1`.
            keys: original indices of the columns to return; all `T` of them if `None`. The softmax runs over every
                readable key either way.
        """

    @abc.abstractmethod
    def shared(self, name: str, build: Callable[[], Tensor], owner: object) -> Tensor:
        """A tensor that is the same in every layer of this pass, built once. Executors share what they derive from it."""

    @abc.abstractmethod
    def drop(self, mask: Bool[Tensor, "b T"]) -> None:
        """Drop tokens: from this layer on (in `plan_feed`: from the next one on) they are neither computed nor read."""

    @abc.abstractmethod
    def spend(self, flops: int) -> None:
        """Book what deciding cost (a router's matrix products), so that the ledger counts it."""

    @property
    @abc.abstractmethod
    def encoder_features(self) -> Any:
        """What the vision encoder returned for this prompt's pictures; `None` if there were none."""


class PromptView(abc.ABC):
    """What a policy may look at, and change, once per prompt before the first layer."""

    shape: ModelShape
    tokens: TokenMap
    embeds: Float[Tensor, "b t d"]
    """The prompt's embeddings. Assign to rewrite or merge them."""
    position_ids: Tensor
    """`[b t]` or `[axes b t]`. Assign to re-index; decoding goes on from the shifted positions."""
    state: dict[str, Any]

    @abc.abstractmethod
    def drop(self, mask: Bool[Tensor, "b t"]) -> None:
        """Drop tokens before the first layer."""

    @property
    @abc.abstractmethod
    def encoder_features(self) -> Any:
        """What the vision encoder returned for this prompt's pictures; `None` if there were none."""


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

    @property
    def decodes(self) -> bool:
        """Whether it is asked while decoding. Override where the rule for a decoded token is another one than at prefill."""
        return self.causal

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

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments that make this policy again, learned tensors aside: what `sparing.save` writes.

        They are read from the attributes of the same names; override it where there are none.

        Raises:
            ValueError: an argument is not kept as an attribute.
        """
        cls = type(self)
        if cls.__init__ in (object.__init__, nn.Module.__init__):
            return {}
        found = {}
        for name, parameter in inspect.signature(cls).parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or not hasattr(self, name):
                raise ValueError(
                    f"{cls.__name__} does not keep its argument {name!r}: set self.{name} in __init__, or override arguments()"
                )
            found[name] = getattr(self, name)
        return found

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

    def parts(self) -> tuple[Policy, ...]:
        """The policies this one is made of, in order."""
        return self._parts

    def __repr__(self) -> str:
        """`A() & B()`."""
        return " & ".join(map(repr, self._parts)) or "Composed()"


def check_layers(layers: Any, shape: ModelShape, what: str) -> None:
    """Raise `ValueError` unless every entry of `layers` is a layer of the model."""
    wrong = [i for i in layers if not 0 <= i < shape.depth]
    if wrong:
        raise ValueError(f"{what}: layer {wrong[0]} does not exist; this model has layers 0..{shape.depth - 1}")
