"""`--shrink`: a study's grid with small data, to see in a minute that it runs. Its figures mean nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sparing import zoo

T = TypeVar("T")

# What settings of these names are brought down to.
SMALL: dict[str, Any] = {
    "max_tokens": 512,
    "max_new_tokens": 4,
    "limit": 4,
    "window": 64,
    "repeats": 1,
    "steps": 2,
    "aligning_steps": 2,
    "width": 1,
    "batches": (1, 2),
    "prompt": 16,
    "per_task": 2,
    "items": 5,
    "scenes": 4,
    "found_on": 8,
    "per_kind": 2,
    "rows": 2,
    "turns": 2,
}
STAND_IN = "arithmetic-llama"


def smaller(settings: T, folder: Path) -> T:
    """The same settings with less data; a text that is not on this machine gives way to a page of the zoo.

    Settings that know it themselves say it with a method of this name.

    Args:
        settings: a method, training or task.
        folder: what relative paths are relative to.
    """
    assert dataclasses.is_dataclass(settings)
    if (own := getattr(settings, "smaller", None)) is not None:
        return own(folder)
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in SMALL and value is not None:
            small = SMALL[field.name]
            changed[field.name] = min(value, small) if isinstance(small, int) and isinstance(value, int) else small
        elif field.name == "data" and isinstance(value, Path):
            # Drawn scenes need no folder of pictures.
            changed[field.name] = None
        elif field.name == "text" and isinstance(value, Path) and not (folder / value).exists():
            changed[field.name] = Path(zoo.__file__).parent / "pages" / "arithmetic.txt"
    return dataclasses.replace(settings, **changed) if changed else settings  # type: ignore[return-value]


def stand_in(path: str, resolve: Callable[[str], str], like: str | None = None) -> str:
    """The checkpoint whose architecture and tokenizer are taken: `like`, else its own, else one of the zoo where it is not here."""
    path = resolve(like or path)
    return path if Path(path).is_dir() else resolve(STAND_IN)
