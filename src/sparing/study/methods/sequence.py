"""Methods that compose: one after the other on the same model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sparing.evaluate.task import Progress, Subject
from sparing.study.methods.method import Method, Prepared
from sparing.study.names import placed, unknown
from sparing.study.shrinking import smaller


@dataclasses.dataclass(frozen=True)
class InSequence(Method):
    """One method after the other, each on what the one before made of the model.

    Attributes:
        methods: each as in a study: `use`, and `with` where it has settings.
        parts: the methods themselves.
    """

    methods: tuple[Mapping[str, Any], ...]
    parts: tuple[Method, ...] = dataclasses.field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Make the methods.

        Raises:
            ValueError: fewer than two, or one that cannot be made.
        """
        if len(self.methods) < 2:
            raise ValueError(f"methods: expected at least two, got {len(self.methods)}; one alone needs no sequence")
        object.__setattr__(self, "parts", tuple(map(_part, self.methods)))

    @property
    def changes_model(self) -> bool:  # type: ignore[override]
        """If one of them does."""
        return any(part.changes_model for part in self.parts)

    @property
    def seeded(self) -> bool:
        """If one of them is."""
        return any(part.seeded for part in self.parts)

    def check(self) -> None:
        """Each looks at its own."""
        for part in self.parts:
            part.check()

    def files(self) -> tuple[Path, ...]:
        """Those of all."""
        return tuple(dict.fromkeys(file for part in self.parts for file in part.files()))

    def placed(self, folder: Path) -> InSequence:
        """The same with relative paths taken from a folder."""
        return self._of(tuple(placed(part, folder) for part in self.parts))

    def smaller(self, folder: Path) -> InSequence:
        """The same with less data."""
        return self._of(tuple(smaller(part, folder) for part in self.parts))

    def prepare(self, subject: Subject, *, seed: int, on_step: Progress | None = None) -> Prepared:
        """One after the other."""
        details = []
        for i, part in enumerate(self.parts):

            def forward(done: float, word: str, i: int = i) -> None:
                if on_step is not None:
                    on_step((i + done) / len(self.parts), word)

            prepared = part.prepare(subject, seed=seed, on_step=forward)
            subject = prepared.subject
            details.append(dict(prepared.details))
        return Prepared(subject, {"sequence": details})

    def _of(self, parts: tuple[Method, ...]) -> InSequence:
        told = [
            {**given, "with": {name: getattr(part, name, value) for name, value in given.get("with", {}).items()}}
            for given, part in zip(self.methods, parts, strict=True)
        ]
        made = dataclasses.replace(self, methods=tuple(told))
        object.__setattr__(made, "parts", parts)
        return made


def _part(given: Mapping[str, Any]) -> Method:
    # Parts may be anything that has a name, and sequences have one.
    from sparing.study.methods.known import method_maker

    if strange := [name for name in given if name not in ("use", "with")]:
        raise ValueError("methods: " + unknown("setting of a part", str(strange[0]), ("use", "with")))
    if "use" not in given:
        raise ValueError("methods: `use` is missing in a part: name its method or policy")
    try:
        return method_maker(given["use"])(given.get("with") or {})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise ValueError(f"methods: {given['use']}: {name}: {first['msg'].removeprefix('Value error, ')}") from error
