"""Methods that act on classes of picture tokens, and ablations, for studies: what is needed of what a picture's tokens hold?"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from PIL.Image import Image

from sparing import ablate
from sparing.anatomy import fingerprint
from sparing.checkpoint.registry import known_policies
from sparing.evaluate.pictures.files import picture_files, pictures_in
from sparing.evaluate.task import NotApplicable, Progress, Subject
from sparing.execute import apply
from sparing.lens import token_classes
from sparing.plan import Policy, Selection
from sparing.policies import OfClass
from sparing.study.methods.method import Method, Prepared
from sparing.study.names import unknown
from sparing.tokens import Group, TokenProfile
from sparing.worlds.grids import GridWorld
from sparing.worlds.opening import scene_files, scene_world

ABLATIONS: Mapping[str, Callable[..., Policy]] = {name: getattr(ablate, name) for name in ablate.__all__}
# Arguments of ablations that name tokens.
PLACES = ("where", "queries", "keys", "pairs")
SCENES_SEED = 3


@dataclasses.dataclass(frozen=True)
class _OnTokens(Method):
    """What methods share that may speak of a class of tokens, found in the model itself.

    Attributes:
        classes: `sink`, `vit_sink`, `llm_sink`, `dead`, `alive`; all picture tokens without any.
        control: take as many others instead: `random` or `uniform`, drawn by the cell's seed, or `background`; see `OfClass`.
        inverse: take all but these.
        rule: how classes are told, see `token_classes`.
        words: class -> words of the vocabulary: tell classes by these instead, found or not (EmbedLens' rule).
        top: how many of a token's nearest words are looked at for `words`.
        pictures: a folder of pictures to find them on; scenes of the validation split by default.
        data: a folder of real digits and photographs to make those scenes of; drawn ones by default.
        found_on: how many pictures.
    """

    classes: tuple[str, ...] = ()
    control: Literal["random", "uniform", "background"] | None = None
    inverse: bool = False
    rule: Literal["anchors", "release"] = "anchors"
    words: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    top: int = 1
    pictures: Path | None = None
    data: Path | None = None
    found_on: int = 48

    @property
    def seeded(self) -> bool:
        """A random control is."""
        return self.control in ("random", "uniform")

    def check(self) -> None:
        """The folder must hold pictures."""
        if self.control is not None and not self.classes:
            raise ValueError(f"control={self.control}: a control of which classes? Name them under `classes`")
        if self.pictures is not None and (number := len(picture_files(self.pictures))) < 8:
            raise ValueError(f"{self.pictures}: expected a folder with at least 8 pictures, found {number}")

    def files(self) -> tuple[Path, ...]:
        """The pictures."""
        if self.pictures is None:
            return scene_files(self.data)
        return picture_files(self.pictures)[: self.found_on]

    def chosen(self, subject: Subject, seed: int) -> tuple[Selection | Group, dict[str, Any]]:
        """What the settings speak of in this model, and what was found of its tokens.

        Raises:
            NotApplicable: the model has no tokens of the classes.
        """
        if not self.classes:
            return Group.IMAGE, {}
        profile = profile_of(subject, self.pictures or scene_world(self.data), self.found_on, self.rule)
        details = {"shares": dict(profile.shares), "notes": list(profile.notes)}
        try:
            if self.words:
                known = subject.tokenizer.get_vocab()
                if strange := [word for words in self.words.values() for word in words if word not in known]:
                    raise ValueError(f"the vocabulary has no word {strange[0]!r}")
                named = {name: tuple(known[word] for word in words) for name, words in self.words.items()}
                profile = profile.by_words(named, top=self.top)
            return OfClass(profile, self.classes, self.control, seed, inverse=self.inverse), details
        except ValueError as error:
            raise NotApplicable(str(error)) from error

    def try_on(self, subject: Subject, policy: Policy, execute: Literal["gathered", "dense"]) -> Subject:
        """The subject with one more policy, or the reason why it cannot be."""
        policies = (*subject.policies, policy)
        try:
            with apply(subject.model, *policies, execute=execute):
                pass
        except ValueError as error:
            raise NotApplicable(f"{policy!r} cannot act on this model: {error}") from error
        return dataclasses.replace(subject, policies=policies, execute=execute)


@dataclasses.dataclass(frozen=True)
class TokenClass(_OnTokens):
    """A policy for the tokens of a class: prune them (`DropTokens`), skip modules for them, let them enter late.

    Attributes:
        policy: the policy's class; it must take `where`.
        arguments: of its constructor, without `where`.
        execute: the executor.
    """

    policy: str = "DropTokens"
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    execute: Literal["gathered", "dense"] = "gathered"

    def check(self) -> None:
        """The policy must be one that acts on chosen tokens."""
        super().check()
        takers = [name for name, cls in known_policies().items() if "where" in inspect.signature(cls).parameters]
        if self.policy not in takers:
            raise ValueError(unknown("policy for chosen tokens", self.policy, takers))
        parameters = inspect.signature(known_policies()[self.policy]).parameters
        if strays := [name for name in self.arguments if name not in parameters]:
            raise ValueError(unknown(f"argument of {self.policy}", strays[0], parameters))

    def prepare(self, subject: Subject, *, seed: int, on_step: Progress | None = None) -> Prepared:
        """Find the classes, make the policy, and try it on."""
        where, details = self.chosen(subject, seed)
        given: dict[str, Any] = {"groups": [where]} if isinstance(where, Group) else {"where": where}
        try:
            policy = known_policies()[self.policy](**given, **self.arguments)
        except (TypeError, ValueError) as error:
            raise NotApplicable(f"{self.policy} cannot be made: {error}") from error
        return Prepared(self.try_on(subject, policy, self.execute), details)


@dataclasses.dataclass(frozen=True)
class Ablation(_OnTokens):
    """An ablation of `sparing.ablate`, under `dense`: it changes the result to learn from it, and is no speed-up.

    Attributes:
        do: `knock_out`, `replace`, `scale_norms`, `swap_tokens`.
        arguments: of it. Where it asks for tokens (`where`, `queries`, `keys`, `pairs`), `"IMAGE"` and the like name groups, and
            `"classes"` the tokens of `classes`.
    """

    do: str = "knock_out"
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def seeded(self) -> bool:
        """What draws at random is."""
        takes = inspect.signature(ABLATIONS[self.do]).parameters if self.do in ABLATIONS else {}
        return super().seeded or ("seed" in takes and "seed" not in self.arguments)

    def check(self) -> None:
        """The ablation and its arguments must be known."""
        super().check()
        if self.do not in ABLATIONS:
            raise ValueError(unknown("ablation", self.do, ABLATIONS))
        parameters = inspect.signature(ABLATIONS[self.do]).parameters
        if strays := [name for name in self.arguments if name not in parameters]:
            raise ValueError(unknown(f"argument of {self.do}", strays[0], parameters))
        for name in PLACES:
            if (
                isinstance(given := self.arguments.get(name), str)
                and given != "classes"
                and given not in Group.__members__
            ):
                raise ValueError(unknown("group of tokens", given, [*Group.__members__, "classes"]))
        if "classes" in self.arguments.values() and not self.classes:
            raise ValueError('an argument says "classes": name them under `classes`')

    def prepare(self, subject: Subject, *, seed: int, on_step: Progress | None = None) -> Prepared:
        """Make the ablation, and try it on."""
        where, details = self.chosen(subject, seed)
        given = {
            name: (where if value == "classes" else Group[value])
            if name in PLACES and isinstance(value, str)
            else value
            for name, value in self.arguments.items()
        }
        if "seed" in inspect.signature(ABLATIONS[self.do]).parameters:
            given.setdefault("seed", seed)
        try:
            policy = ABLATIONS[self.do](**given)
        except (TypeError, ValueError) as error:
            raise NotApplicable(f"{self.do} cannot be made: {error}") from error
        return Prepared(self.try_on(subject, policy, "dense"), details)


def profile_of(
    subject: Subject, pictures: Path | GridWorld, number: int, rule: Literal["anchors", "release"]
) -> TokenProfile:
    """The classes of a model's picture tokens, found once for all cells of it.

    Raises:
        NotApplicable: it sees no pictures.
    """
    key = fingerprint(subject.model), pictures, number, rule
    if key not in _PROFILES:
        try:
            _PROFILES[key] = token_classes(
                subject.model,
                subject.processor,
                _scenes(pictures, number)
                if isinstance(pictures, GridWorld)
                else [picture.image for picture in pictures_in(pictures, number)],
                question="what colour is background ?"
                if isinstance(pictures, GridWorld)
                else "What is in the picture?",
                rule=rule,
            )
        except ValueError as error:
            raise NotApplicable(f"the classes of its tokens cannot be found: {error}") from error
    return _PROFILES[key]


_PROFILES: dict[tuple[str, Path | GridWorld, int, str], TokenProfile] = {}


@functools.cache
def _scenes(world: GridWorld, number: int) -> list[Image]:
    drawn = itertools.islice(world.stream("validation", SCENES_SEED), number)
    return [world.picture(scene) for scene in drawn]
