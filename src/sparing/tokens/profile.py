"""`TokenProfile`: how the classes of a checkpoint's picture tokens are told, found once and reused."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparing.tokens.names import nearest

CLASSES = ("vit_sink", "llm_sink", "dead", "alive")
"""What a token can be. The index is what `TokenProfile.classify` returns."""
NAMES = ("sink", *CLASSES)
"""What can be asked for: `sink` is a sink of either kind."""
ALIVE = CLASSES.index("alive")
SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Anchor:
    """A direction before the first layer around which tokens of a class lie.

    Attributes:
        classes: what it stands for; more than one where the signs of several were found.
        direction: of unit length.
        cosine: a token whose cosine to it is not below this belongs to the classes.
        evidence: what was measured of the tokens around it, for people (see `sparing.lens.token_classes`).
    """

    classes: tuple[str, ...]
    direction: tuple[float, ...]
    cosine: float
    evidence: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TokenProfile:
    """How to tell sink, dead and alive tokens of one checkpoint by what they hold before the first layer.

    There are two rules. By *anchors*, a token belongs to a class if it lies near one of its directions. By *words*, it does if
    one of its `top` nearest words in the vocabulary is one of the class's words (what EmbedLens' release does). A token of no
    class is alive.

    `sparing.lens.token_classes` finds a profile, `save` and `load` keep it, `sparing.policies.OfClass` acts on it.

    Attributes:
        checkpoint: fingerprint of the only checkpoint that it is of (`sparing.anatomy.fingerprint`).
        anchors: directions and what they stand for.
        words: class -> ids of its words in the vocabulary: what the anchors' tokens share.
        rule: `anchors` or `words`.
        top: how many nearest words count, where the rule is `words`.
        shares: class -> share of the picture tokens it was found on, each token in one class.
        overlapping: the same where a token can be in several.
        notes: what people should know: above all, which classes this model does not have, and why.
        found: how it was found: settings, counts, measurements.

    Raises:
        ValueError: an unknown class or rule, an anchor that is no direction.

    Paper: EmbedLens (2603.00510), sections on sink, dead and alive tokens.
    """

    checkpoint: str
    anchors: tuple[Anchor, ...] = ()
    words: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    rule: str = "anchors"
    top: int = 3
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    overlapping: Mapping[str, float] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    found: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what a hand or a file wrote."""
        if self.rule not in ("anchors", "words"):
            raise ValueError(f"the rule of a profile is {self.rule!r}: choose 'anchors' or 'words'")
        if self.top < 1:
            raise ValueError(f"the rule looks at the top {self.top} words: give at least 1")
        for name in [*(name for anchor in self.anchors for name in anchor.classes), *self.words]:
            if name not in CLASSES[:ALIVE]:
                raise ValueError(f"a profile can tell {', '.join(CLASSES[:ALIVE])}; got {name!r}")
        widths = {len(anchor.direction) for anchor in self.anchors}
        for anchor in self.anchors:
            length = math.sqrt(sum(x * x for x in anchor.direction))
            if len(widths) != 1 or not abs(length - 1) < 1e-3 or not -1 <= anchor.cosine <= 1:
                raise ValueError(
                    "an anchor's direction must be finite, of unit length and of the model's width, and its cosine between -1 and 1: "
                    "find the profile again with sparing.lens.token_classes"
                )

    def has(self, name: str) -> bool:
        """Whether this model has tokens of a class, as far as was found; every model has alive ones.

        Raises:
            ValueError: no such class.
        """
        if name not in NAMES:
            raise ValueError(f"no class of tokens is called {name!r}{nearest(name, NAMES)}")
        if name == "alive":
            return True
        wanted = _members(name)
        if self.rule == "words":
            return any(self.words.get(one) for one in wanted)
        return any(not wanted.isdisjoint(anchor.classes) for anchor in self.anchors)

    def classify(
        self,
        states: Float[Tensor, "n d"],
        *,
        overlapping: bool = False,
        vocabulary: Float[Tensor, "v d"] | None = None,
    ) -> Int[Tensor, " n"] | dict[str, Bool[Tensor, " n"]]:
        """The class of each token.

        Args:
            states: what picture tokens hold before the first layer: level 0 of a `Recording`, `PromptView.embeds`.
            overlapping: return a mask for each of `NAMES`, and let a token be in several classes.
            vocabulary: the input embeddings; the rule `words` needs them.

        Returns:
            Indices into `CLASSES`. A token near several classes belongs to the one whose anchor (or word) is nearest.

        Raises:
            ValueError: states of another width, or that are not finite; the rule `words` without a vocabulary.
        """
        if states.ndim != 2 or (self.anchors and states.shape[1] != len(self.anchors[0].direction)):
            wide = len(self.anchors[0].direction) if self.anchors else "d"
            raise ValueError(f"the states have shape {list(states.shape)}: this profile tells tokens [n, {wide}]")
        if not bool(states.isfinite().all()):
            raise ValueError(
                "the states of some tokens are not finite: the model or its pictures hold NaN or infinite values"
            )
        scores = self._by_words(states, vocabulary) if self.rule == "words" else self._by_anchors(states)
        member = scores > -math.inf
        if not overlapping:
            return torch.where(member.any(1), scores.argmax(1), ALIVE)
        found = {name: member[:, i] for i, name in enumerate(CLASSES[:ALIVE])}
        return {"sink": found["vit_sink"] | found["llm_sink"], **found, "alive": ~member.any(1)}

    def flops(self, width: int, vocabulary: int) -> int:
        """Floating-point operations that telling the class of one token takes.

        Args:
            width: of the states.
            vocabulary: words that the model knows.
        """
        return 2 * width * (vocabulary if self.rule == "words" else len(self.anchors))

    def _by_anchors(self, states: Tensor) -> Tensor:
        """`[n classes]`, cosine to the nearest anchor of each class that is near enough; minus infinity where none is."""
        scores = states.new_full((len(states), ALIVE), -math.inf, dtype=torch.float32)
        if not self.anchors:
            return scores
        directions = torch.tensor([anchor.direction for anchor in self.anchors], device=states.device)
        least = torch.tensor([anchor.cosine for anchor in self.anchors], device=states.device)
        cosine = torch.nn.functional.normalize(states.float(), dim=1) @ directions.T
        near = cosine.masked_fill(cosine < least, -math.inf)
        for i, name in enumerate(CLASSES[:ALIVE]):
            mine = [j for j, anchor in enumerate(self.anchors) if name in anchor.classes]
            if mine:
                scores[:, i] = near[:, mine].amax(1)
        return scores

    def _by_words(self, states: Tensor, vocabulary: Tensor | None) -> Tensor:
        """The same with words: those of the class among the nearest ones."""
        if vocabulary is None:
            raise ValueError("this profile tells tokens by their nearest words: give vocabulary=, the input embeddings")
        words = torch.nn.functional.normalize(vocabulary.float(), dim=1)
        cosine, ids = nearest_words(states, words, min(self.top, len(words)))
        scores = states.new_full((len(states), ALIVE), -math.inf, dtype=torch.float32)
        for i, name in enumerate(CLASSES[:ALIVE]):
            mine = torch.tensor(self.words.get(name, ()), dtype=torch.long, device=ids.device)
            scores[:, i] = cosine.masked_fill(~torch.isin(ids, mine), -math.inf).amax(1)
        return scores

    def by_words(self, words: Mapping[str, Iterable[int]] | None = None, *, top: int = 3) -> TokenProfile:
        """The same classes told by words: those that were found, or those given.

        Args:
            words: class -> ids.
            top: how many nearest words count.

        Differs: EmbedLens' release has ids of LLaVA-1.5-7B written into it, `{"vit_sink": [1141], "llm_sink": [26673],
            "dead": [30296]}`; here they are found, or given.
        """
        given = self.words if words is None else {name: tuple(map(int, ids)) for name, ids in words.items()}
        return dataclasses.replace(self, words=given, rule="words", top=top, shares={}, overlapping={})

    # Kept in a file -----------------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return {"schema": SCHEMA, **json.loads(json.dumps(dataclasses.asdict(self), allow_nan=False))}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> TokenProfile:
        """What `as_dict` gave.

        Raises:
            ValueError: it is no profile, or one of a newer schema.
        """
        if given.get("schema") != SCHEMA:
            raise ValueError(
                f"a profile of schema {given.get('schema')!r}, this version reads {SCHEMA}: find it again with "
                "sparing.lens.token_classes"
            )
        try:
            anchors = tuple(
                Anchor(tuple(a["classes"]), tuple(map(float, a["direction"])), float(a["cosine"]), a["evidence"])
                for a in given["anchors"]
            )
            return cls(
                checkpoint=str(given["checkpoint"]),
                anchors=anchors,
                words={name: tuple(map(int, ids)) for name, ids in given["words"].items()},
                rule=given["rule"],
                top=int(given["top"]),
                shares=given["shares"],
                overlapping=given["overlapping"],
                notes=tuple(given["notes"]),
                found=given["found"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"this is no token profile ({error!r}): find it with sparing.lens.token_classes"
            ) from error

    def save(self, path: str | Path) -> Path:
        """Write it as JSON.

        Returns:
            The file.
        """
        path = Path(path)
        path.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> TokenProfile:
        """Read what `save` wrote.

        Args:
            path: the file.
            model: refuse a profile of another checkpoint than this model's.

        Raises:
            ValueError: there is no such file, it is no profile, or it is another checkpoint's.
        """
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path}: there is no such token profile; sparing.lens.token_classes finds one") from error
        except ValueError as error:
            raise ValueError(
                f"{path} is no JSON ({error}): find the profile with sparing.lens.token_classes"
            ) from error
        if not isinstance(given, dict):
            raise ValueError(f"{path} is no token profile: find it with sparing.lens.token_classes")
        try:
            profile = cls.from_dict(given)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if model is not None:
            profile.check(model)
        return profile

    def check(self, model: Any) -> None:
        """Refuse another checkpoint than the profile's own.

        Raises:
            ValueError: it is another one.
        """
        own = _fingerprint(model)
        if own != self.checkpoint:
            raise ValueError(
                f"the profile is of the checkpoint {self.checkpoint}, this model is {own}: find its own with "
                "sparing.lens.token_classes(model, processor, pictures)"
            )

    def __str__(self) -> str:
        """Shares and notes, in lines."""
        told = ", ".join(f"{name} {self.shares[name]:.1%}" for name in CLASSES if name in self.shares)
        return "\n".join([told or "no shares", *self.notes])


def nearest_words(
    states: Float[Tensor, "n d"], words: Float[Tensor, "v d"], k: int, *, chunk: int = 1024
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The cosines and ids of the `k` nearest of unit-length `words`, nearest first; `chunk` states at a time."""
    parts = [
        (torch.nn.functional.normalize(part.float(), dim=1) @ words.T).topk(k, dim=1) for part in states.split(chunk)
    ]
    if not parts:
        return states.new_zeros(0, k, dtype=torch.float32), torch.zeros(0, k, dtype=torch.long, device=states.device)
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def _members(name: str) -> set[str]:
    return {"vit_sink", "llm_sink"} if name == "sink" else {name}


def members_of(names: Iterable[str]) -> tuple[str, ...]:
    """Classes with `sink` taken apart, in the order of `CLASSES`.

    Raises:
        ValueError: an unknown class.
    """
    wanted: set[str] = set()
    for name in names:
        if name not in NAMES:
            raise ValueError(f"no class of tokens is called {name!r}{nearest(name, NAMES)}")
        wanted |= _members(name)
    return tuple(name for name in CLASSES if name in wanted)


def _no_fingerprint(model: Any) -> str:
    raise ValueError("no model family is known: import sparing.anatomy first")


_fingerprint: Callable[[Any], str] = _no_fingerprint


def fingerprint_with(function: Callable[[Any], str]) -> None:
    """Set what tells checkpoints apart. The family adapters live above this room and hand it in here."""
    global _fingerprint
    _fingerprint = function
