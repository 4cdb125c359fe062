"""YAML with line numbers: what was written where, so that an error can point at it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

Place = tuple[str | int, ...]


def read_yaml(path: Path) -> tuple[Any, dict[Place, int]]:
    """Read a YAML file.

    Returns:
        Its content, and the line of every key and list entry by its place: `("methods", "greedy", "with")` -> 12.

    Raises:
        ValueError: no such file, no YAML, or a key that is written twice.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"the study file {path} {what}: name a YAML file")
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[Place, int] = {}
        if root is not None:
            _walk(root, (), lines, path)
        return yaml.safe_load(text), lines
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error


def line_of(place: Sequence[str | int], lines: dict[Place, int]) -> int | None:
    """The line of a place, or of the nearest one around it that is written down."""
    place = tuple(place)
    while place:
        if place in lines:
            return lines[place]
        place = place[:-1]
    return lines.get(())


def _walk(node: yaml.Node, place: Place, lines: dict[Place, int], path: Path) -> None:
    lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            # Later ones would silently win.
            if key.value in seen:
                raise ValueError(f"{path}, line {key.start_mark.line + 1}: {key.value!r} is written twice; keep one")
            seen.add(key.value)
            lines[(*place, key.value)] = key.start_mark.line + 1
            _walk(value, (*place, key.value), lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _walk(value, (*place, i), lines, path)
