"""The checkpoint as it is, and under any policy by name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from sparing.anatomy import anatomy_of
from sparing.checkpoint.registry import known_policies, rebuild_untrained, selections_in
from sparing.evaluate.task import NotApplicable, Progress, Subject
from sparing.execute import apply
from sparing.study.methods.method import Method, Prepared
from sparing.study.names import unknown


@dataclasses.dataclass(frozen=True)
class Dense(Method):
    """The checkpoint as it is: the baseline."""

    def prepare(self, subject: Subject, *, seed: int, on_step: Progress | None = None) -> Prepared:
        """Nothing is done."""
        return Prepared(subject)


@dataclasses.dataclass(frozen=True)
class UsePolicy(Method):
    """A policy by its class name and arguments; routers that nobody has trained are drawn from the seed.

    Attributes:
        policy: the class's registered name.
        arguments: of its constructor; `hidden` and `depth` are the model's where they are not given.
        execute: the executor.
    """

    policy: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    execute: Literal["gathered", "dense"] = "gathered"

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            ValueError: no such policy, or an argument that it does not have.
        """
        if self.policy not in known_policies():
            raise ValueError(unknown("policy", self.policy, known_policies()))
        parameters = inspect.signature(known_policies()[self.policy]).parameters
        if strays := [name for name in self.arguments if name not in parameters]:
            raise ValueError(unknown(f"argument of {self.policy}", strays[0], parameters))
        selections_in(self.arguments)

    def check(self) -> None:
        """What its selections read must be there, and they must be able to choose something."""
        for kind, given in selections_in(self.arguments).values():
            kind(**given)

    def files(self) -> tuple[Path, ...]:
        """What its selections read."""
        found = selections_in(self.arguments).values()
        return tuple(
            Path(given[name]) for kind, given in found for name in kind.paths if isinstance(given.get(name), str | Path)
        )

    def placed(self, folder: Path) -> UsePolicy:
        """The same with the files of its selections taken from a folder."""
        arguments = dict(self.arguments)
        for key, (kind, given) in selections_in(arguments).items():
            moved = {name: folder / given[name] for name in kind.paths if isinstance(given.get(name), str)}
            arguments[key] = {next(iter(arguments[key])): {**given, **moved}}
        return dataclasses.replace(self, arguments=arguments)

    def _selecting(self, seed: int) -> dict[str, Any]:
        """The arguments, with the seed in every selection that takes one and was given none."""
        arguments = dict(self.arguments)
        for key, (kind, given) in selections_in(arguments).items():
            own = {"seed": seed} if "seed" in inspect.signature(kind).parameters else {}
            arguments[key] = {next(iter(arguments[key])): {**own, **given}}
        return arguments

    @property
    def seeded(self) -> bool:
        """Routers are drawn at random, and so is a choice that takes a seed."""
        cls = known_policies()[self.policy]
        if selections := selections_in(self.arguments).values():
            return any("seed" not in given and kind(**given).seeded for kind, given in selections)
        return issubclass(cls, nn.Module) or "seed" in inspect.signature(cls).parameters

    def prepare(self, subject: Subject, *, seed: int, on_step: Progress | None = None) -> Prepared:
        """Make the policy for this model's sizes, and try it on."""
        parameters = inspect.signature(known_policies()[self.policy]).parameters
        shape = anatomy_of(subject.model).shape()
        own = {"hidden": shape.layers[0].hidden, "depth": shape.depth, "seed": seed}
        arguments = {name: value for name, value in own.items() if name in parameters} | self._selecting(seed)
        try:
            policy = rebuild_untrained(self.policy, arguments)
            if isinstance(policy, nn.Module):
                policy.to(subject.model.get_input_embeddings().weight.device)  # type: ignore[operator]
            policies = (*subject.policies, policy)
            with apply(subject.model, *policies, execute=self.execute):
                pass
        except ValueError as error:
            raise NotApplicable(f"{self.policy} cannot act on this model: {error}") from error
        except TypeError as error:
            raise ValueError(
                f"{self.policy} cannot be made of {dict(self.arguments)}: {error}; mend their types"
            ) from error
        return Prepared(dataclasses.replace(subject, policies=policies, execute=self.execute))
