"""A study as it lies in its folder: what was asked, and what came out, ready to be read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparing.study.methods.known import known_methods
from sparing.study.methods.skipping import RandomSkip
from sparing.study.store import Store, Stored
from sparing.study.study import RESULTS


@dataclasses.dataclass(frozen=True)
class Arm:
    """A method with its settings and its training, on whatever model and with whatever seed.

    Attributes:
        label: its names with the settings that vary.
        method: the method's name in the study.
        training: the training's name; `none` without.
        control: is it there for the others to beat?
        baseline: are the others compared with it?
    """

    label: str
    method: str
    training: str
    control: bool = False
    baseline: bool = False


@dataclasses.dataclass(frozen=True)
class Results:
    """What a folder holds.

    Attributes:
        folder: the folder.
        about: the facts on the study itself, see `Store.about`.
        cells: those of the study that have a result, in its order.
        arms: the arm of each cell: key -> arm.
        pending: labels of the cells that were not run yet.
        earlier: how many results belong to cells that the study no longer has (its YAML changed).
        matched: the matched controls of an arm, under the same training: arm -> those that it has to beat.
    """

    folder: Path
    about: Mapping[str, Any]
    cells: Sequence[Stored]
    arms: Mapping[str, Arm]
    pending: Sequence[str] = ()
    earlier: int = 0
    matched: Mapping[Arm, tuple[Arm, ...]] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """The study's name."""
        return str(self.about.get("study", self.folder.name))

    @property
    def shrunk(self) -> bool:
        """Was it run on two layers of random weights, so that its figures mean nothing?"""
        return bool(self.about.get("shrink")) or any(cell.content.get("shrink") for cell in self.cells)


def read_results(folder: Path, *, items: bool = True) -> Results:
    """Read a study's folder.

    Args:
        folder: the folder of a run.
        items: with the scores of single items.

    Raises:
        ValueError: there are no results in it, or they cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name the one that the study was run into (--out)")
    with Store(folder / RESULTS) as store:
        about = store.about()
        everything = {cell.key: cell for cell in store.cells(items=items)}
    keys: Sequence[str] = about.get("cells", list(everything))
    labels: Mapping[str, str] = about.get("labels", {})
    cells = [everything[key] for key in keys if key in everything]
    arms = _arms(cells, labels, about)
    return Results(
        folder=folder,
        about=about,
        cells=cells,
        arms=arms,
        pending=[labels.get(key, key) for key in keys if key not in everything],
        earlier=len(everything) - len(cells),
        matched=_matched(cells, arms, about),
    )


def task_name(label: str) -> str:
    """The name of a task in the study, without the settings that vary; names hold no brackets."""
    return label.partition(" (")[0]


def _arms(cells: Sequence[Stored], labels: Mapping[str, str], about: Mapping[str, Any]) -> dict[str, Arm]:
    baseline = _baseline(cells, about.get("baseline"))
    return {
        cell.key: Arm(
            label=_arm_label(cell, labels.get(cell.key)),
            method=cell.method,
            training=cell.training,
            control=_is_control(cell, about.get("controls")),
            baseline=_identity(cell) == baseline,
        )
        for cell in cells
    }


def _matched(cells: Sequence[Stored], arms: Mapping[str, Arm], about: Mapping[str, Any]) -> dict[Arm, tuple[Arm, ...]]:
    """The controls of each arm, as the study pairs its variants; of those that have a result."""
    variants: Mapping[str, int] = about.get("variants", {})
    places: dict[tuple[int, str], Arm] = {}
    for cell in cells:
        if cell.key in variants:
            training = json.dumps([cell.training, cell.content.get("training")], sort_keys=True)
            places.setdefault((variants[cell.key], training), arms[cell.key])
    found: dict[Arm, tuple[Arm, ...]] = {}
    for (variant, training), arm in places.items():
        controls = [j for i, j in about.get("matched", ()) if i == variant and (j, training) in places]
        if controls:
            found[arm] = tuple(places[j, training] for j in controls)
    return found


def _identity(cell: Stored) -> str:
    content = [cell.method, cell.training, cell.content.get("method"), cell.content.get("training")]
    return json.dumps(content, sort_keys=True)


def _baseline(cells: Sequence[Stored], method: str | None) -> str | None:
    """The arm to compare with: the baseline method's first variant, untrained if there is such a one."""
    found = [cell for cell in cells if cell.method == method]
    return next((_identity(cell) for cell in sorted(found, key=lambda cell: cell.training != "none")), None)


def _arm_label(cell: Stored, label: str | None) -> str:
    """The part of a cell's label that is neither its model nor its task nor its seed."""
    if label is not None:
        begin, end = f"{cell.model} · ", f" · {cell.task}"
        end += f" · seed {cell.seed}" if cell.seed is not None else ""
        if label.startswith(begin) and label.endswith(end):
            return label[len(begin) : -len(end)]
    varied = ", ".join(f"{key}={value}" for key, value in cell.varied.items())
    name = f"{cell.method} ({varied})" if varied else cell.method
    return name if cell.training == "none" else f"{name} · {cell.training}"


def _is_control(cell: Stored, controls: Sequence[str] | None) -> bool:
    """By the study's own word, else by the method's class: plans at random are what choosing must beat."""
    if cell.method in (controls or ()):
        return True
    cls = known_methods().get(cell.content.get("method", {}).get("use"))
    return cls is not None and (getattr(cls, "control", False) or issubclass(cls, RandomSkip))
