"""Modules left out: by a search on a text, or at random at the same cost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from sparing.evaluate.profile import Profiler, Settings
from sparing.evaluate.task import NotApplicable, Progress, Subject
from sparing.evaluate.text_material import TextMaterial
from sparing.evaluate.windows import read_text
from sparing.study.methods.method import Method, Prepared


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
