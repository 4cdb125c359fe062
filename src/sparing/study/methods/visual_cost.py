"""Methods at the cost of others: a policy whose share of kept tokens follows from what it may spend on pictures."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, Literal

from sparing.anatomy import anatomy_of
from sparing.checkpoint.registry import known_policies, rebuild_untrained
from sparing.evaluate.reading_layers import Budget
from sparing.evaluate.task import NotApplicable, Progress, Subject
from sparing.execute import apply
from sparing.plan import ModelShape, Policy
from sparing.policies import ViCA
from sparing.policies.budget import at_share, visual_share
from sparing.study.methods.method import Method, Prepared
from sparing.study.names import unknown


@dataclasses.dataclass(frozen=True)
class AtVisualCost(Method):
    """A policy that drops picture tokens, keeping as many as a budget pays for: what ViCA costs with so many layers, or a share.

    What is counted is the policy's schedule (`sparing.policies.budget.visual_share`): neither the encoder, which all run, nor
    rankings. The ledger of the run counts those, and whole numbers of tokens.

    Attributes:
        policy: the class's registered name; it must take `keep`.
        arguments: of its constructor, without `keep`.
        budget: layers that a ViCA of the same cost reads in, or a share of the visual FLOPs (`5%`).
        pictures: picture tokens of a prompt.
        text: tokens behind them.
        execute: the executor.
    """

    policy: str = "DivPrune"
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    budget: int | str = "5%"
    pictures: int = 576
    text: int = 64
    execute: Literal["gathered", "dense"] = "gathered"

    @property
    def seeded(self) -> bool:
        """What draws is, unless a seed is given."""
        return "seed" in self._parameters() and "seed" not in self.arguments

    def check(self) -> None:
        """The policy must be known, take `keep`, and take the arguments; the budget must be one."""
        takers = [name for name, cls in known_policies().items() if "keep" in inspect.signature(cls).parameters]
        if self.policy not in takers:
            raise ValueError(unknown("policy that keeps a share", self.policy, takers))
        if strays := [name for name in self.arguments if name not in self._parameters() or name == "keep"]:
            raise ValueError(unknown(f"argument of {self.policy} beside keep", strays[0], self._parameters()))
        if min(self.pictures, self.text) < 1:
            raise ValueError(f"pictures={self.pictures}, text={self.text}: expected at least one token of each")
        if Budget.of(self.budget).layers == 0:
            raise ValueError("budget=0: a policy that keeps nothing is blind; for that floor use vica_selected")

    def prepare(self, subject: Subject, *, seed: int, on_step: Progress | None = None) -> Prepared:
        """Find the share to keep, and try the policy on."""
        shape = anatomy_of(subject.model).shape()
        sizes = {"pictures": self.pictures, "text": self.text}
        try:
            share = self._share(shape)
            policy = at_share(lambda keep: self._made(keep, seed), share, shape, **sizes)
            with apply(subject.model, *subject.policies, policy, execute=self.execute):
                pass
        except ValueError as error:
            raise NotApplicable(
                f"{self.policy} cannot spend {self.budget} on this model's pictures: {error}"
            ) from error
        details = {"policy": repr(policy), "budget": share, "visual_share": visual_share(policy, shape, **sizes)}
        policies = (*subject.policies, policy)
        return Prepared(dataclasses.replace(subject, policies=policies, execute=self.execute), details)

    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(known_policies()[self.policy]).parameters if self.policy in known_policies() else {}

    def _share(self, shape: ModelShape) -> float:
        """The budget as a share of the dense model's operations on pictures."""
        budget = Budget.of(self.budget)
        if budget.share is not None:
            return budget.share
        assert budget.layers is not None
        if budget.layers > shape.depth:
            raise ValueError(f"a budget of {budget} layers is more than the model's {shape.depth}: give fewer")
        return visual_share(ViCA(range(budget.layers)), shape, pictures=self.pictures, text=self.text)

    def _made(self, keep: float, seed: int) -> Policy:
        arguments = dict(self.arguments)
        if self.seeded:
            arguments["seed"] = seed
        # SparseVLM has a share a stage.
        stages = isinstance(self._parameters()["keep"].default, tuple)
        many = (keep,) * len(arguments.get("layers", self._parameters()["layers"].default)) if stages else keep
        return rebuild_untrained(self.policy, {**arguments, "keep": many})
