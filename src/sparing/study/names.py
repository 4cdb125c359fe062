"""Things that a study's YAML calls by name: ours, and those of installed packages, with the nearest names on a typo."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter

from sparing.evaluate.names import nearest

T = TypeVar("T")


def with_plugins(ours: Mapping[str, type[T]], group: str) -> dict[str, type[T]]:
    """Our classes and those that installed packages offer under an entry point group; ours win."""
    found = dict(ours)
    for point in entry_points(group=group):
        found.setdefault(point.name, point.load())
    return found


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not known: the nearest ones, or all of them where none is near."""
    return f"no {what} is called {name!r}{nearest(name, known)}"


def made(cls: type[T], settings: Mapping[str, Any]) -> T:
    """An instance of a settings dataclass, each value checked and brought to its field's type.

    Raises:
        pydantic.ValidationError: an unknown, missing or unfitting setting.
        ValueError: the class itself refuses a value.
    """
    adapter: TypeAdapter[T] = _ADAPTERS.get(cls) or _ADAPTERS.setdefault(cls, _adapter(cls))
    return adapter.validate_python(dict(settings))


_ADAPTERS: dict[type, TypeAdapter[Any]] = {}


def _adapter(cls: type) -> TypeAdapter[Any]:
    # A copy carries the configuration, so that the class stays an ordinary dataclass.
    cls.__pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=True)  # type: ignore[attr-defined]
    return TypeAdapter(cls)


def placed(instance: T, folder: Path) -> T:
    """The same settings with relative paths taken from a folder; the instance's own `placed` says it where there is one."""
    assert dataclasses.is_dataclass(instance)
    if (own := getattr(instance, "placed", None)) is not None:
        return own(folder)
    moved = {
        field.name: folder / value
        for field in dataclasses.fields(instance)
        if isinstance(value := getattr(instance, field.name), Path) and not value.is_absolute()
    }
    return dataclasses.replace(instance, **moved) if moved else instance  # type: ignore[return-value]


def first_line(thing: Any) -> str:
    """The first line of an object's docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]
