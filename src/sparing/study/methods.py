"""What a study compares: `Method`s turn a loaded model into the `Subject` that tasks measure."""

from __future__ import annotations

import abc
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from sparing.anatomy import anatomy_of
from sparing.checkpoint.registry import known_policies, rebuild_untrained, selections_in
from sparing.evaluate.profile import Profiler, Settings
from sparing.evaluate.task import Ingredient, NotApplicable, Progress, Subject
from sparing.evaluate.text_material import TextMaterial
from sparing.evaluate.windows import read_text
from sparing.execute import apply
from sparing.study.names import made, unknown, with_plugins


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a method made of a model.

    Attributes:
        subject: the model with its policies.
        details: what it chose, as JSON knows it, for the report.
    """

    subject: Subject
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Method(Ingredient):
    """One way to make a model cheaper."""

    changes_model: ClassVar[bool] = False
    """Are weights changed or taken away, so that the next method needs the model loaded afresh?"""

    @abc.abstractmethod
    def prepare(self, subject: Subject, *, seed: int, on_step: Progress | None = None) -> Prepared:
        """Act on a loaded model.

        Args:
            subject: the model, with the policies that its checkpoint came with.
            seed: of whatever is random in the method.
            on_step: is told the share that is done, and a word on it.

        Raises:
            NotApplicable: the method cannot act on this model.
            ValueError: bad data.
        """


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


@dataclasses.dataclass(frozen=True)
class _Budget:
    """The settings that searched and random skipping share, and what follows from them alone.

    Attributes:
        text: the text that plans are chosen on; tasks should measure on another one.
        budget: share of the dense prefill's operations that the plan may cost.
        max_tokens: tokens of the text that are used.
        window: most tokens of a window.
        modules_only: leave out modules only; otherwise kinds of tokens may enter late too.
    """

    text: Path
    budget: float = 0.7
    max_tokens: int = 4096
    window: int = 256
    modules_only: bool = True

    def check(self) -> None:
        """The text must be there."""
        self._settings(0)
        read_text(self.text)

    def files(self) -> tuple[Path, ...]:
        """The text."""
        return (self.text,)

    def _settings(self, seed: int) -> Settings:
        return Settings(budget=self.budget, max_tokens=self.max_tokens, window=self.window, seed=seed, repeats=0)

    def _profiler(self, subject: Subject, settings: Settings) -> Profiler:
        if subject.policies:
            raise NotApplicable("skipping is searched on a stock model, and this checkpoint comes with policies")
        material = TextMaterial(
            subject.model,
            subject.tokenizer,
            read_text(self.text),
            max_tokens=self.max_tokens,
            window=self.window,
            modules_only=self.modules_only,
        )
        return Profiler(material, settings)


@dataclasses.dataclass(frozen=True)
class SearchSkip(_Budget, Method):
    """Modules left out by a search on a text: the best plan found within a budget of operations.

    Attributes:
        search: `greedy` runs the best candidates of every step; `additive` trusts single removals.
        width: candidates of a greedy step.
    """

    search: Literal["greedy", "additive"] = "greedy"
    width: int = 4

    def prepare(self, subject: Subject, *, seed: int, on_step: Progress | None = None) -> Prepared:
        """Search."""
        settings = dataclasses.replace(self._settings(seed), method=self.search, width=self.width)
        job = self._profiler(subject, settings)
        removal = job.search_only(on_step)
        found = dataclasses.replace(subject, policies=tuple(job.material.policies(removal)))
        return Prepared(found, {"plan": str(removal), "flops_share": job.flops(removal) / job.flops.dense})


@dataclasses.dataclass(frozen=True)
class RandomSkip(_Budget, Method):
    """Modules left out at random at the cost of the searched plan: what choosing must beat.

    Attributes:
        matches: the search whose plan's operations are matched; `none` matches the budget itself.
    """

    matches: Literal["greedy", "additive", "none"] = "greedy"
    width: int = 4

    @property
    def seeded(self) -> bool:
        """Plans are drawn."""
        return True

    def prepare(self, subject: Subject, *, seed: int, on_step: Progress | None = None) -> Prepared:
        """Draw a plan."""
        settings = self._settings(seed)
        if self.matches != "none":
            settings = dataclasses.replace(settings, method=self.matches, width=self.width)
        job = self._profiler(subject, settings)
        target = self.budget * job.flops.dense if self.matches == "none" else job.flops(job.search_only(on_step))
        removal = job.random_plan(round(target), seed)
        found = dataclasses.replace(subject, policies=tuple(job.material.policies(removal)))
        return Prepared(found, {"plan": str(removal), "flops_share": job.flops(removal) / job.flops.dense})


OURS: dict[str, type[Method]] = {"dense": Dense, "skip_search": SearchSkip, "skip_random": RandomSkip}


def known_methods() -> dict[str, type[Method]]:
    """Methods by name: ours, and those of installed packages (entry point group `sparing.methods`); policies apart."""
    # They are built on this file.
    from sparing.study.budget_methods import AtVisualCost
    from sparing.study.sequence_method import InSequence
    from sparing.study.token_methods import Ablation, TokenClass
    from sparing.study.vica_methods import SelectedViCA

    more = {
        "token_class": TokenClass,
        "ablation": Ablation,
        "vica_selected": SelectedViCA,
        "at_visual_cost": AtVisualCost,
        "sequence": InSequence,
    }
    return with_plugins({**OURS, **more}, "sparing.methods")


def method_maker(use: str) -> Callable[[Mapping[str, Any]], Method]:
    """What makes a method of its settings, for the name of a method or of a policy.

    Raises:
        ValueError: no method and no policy is called so.
    """
    methods = known_methods()
    if use in methods:
        return lambda settings: made(methods[use], settings)
    if use in known_policies():

        def as_policy(settings: Mapping[str, Any]) -> Method:
            arguments = dict(settings)
            execute = arguments.pop("execute", "gathered")
            return made(UsePolicy, {"policy": use, "arguments": arguments, "execute": execute})

        return as_policy
    raise ValueError(unknown("method", use, [*methods, *known_policies()]))
