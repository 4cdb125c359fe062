"""Two runs of a study, or two studies, side by side: what is in one only, what changed, and how sure that is."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, Literal

from sparing.study.conclusions import conclusions_of
from sparing.study.contrast import Difference, Verdict, contrast
from sparing.study.results import Results
from sparing.study.store import Status, Stored


@dataclasses.dataclass(frozen=True)
class Change:
    """A figure of a cell that both have.

    Attributes:
        label: of the cell, as the second run names it.
        figure: the figure.
        first: its value in the first run.
        second: its value in the second run.
        difference: second minus first.
        content: is the cell the same by content, or only by its names?
        unit: of the figure.
    """

    label: str
    figure: str
    first: float
    second: float
    difference: Difference
    content: Literal["same", "changed"]
    unit: str

    @property
    def verdict(self) -> str:
        """`better`, `worse`, `other`, `same` or `unsure`; a figure that stopped being a number is `worse`."""
        if math.isfinite(self.first) and not math.isfinite(self.second):
            return "worse"
        if math.isfinite(self.second) and not math.isfinite(self.first):
            return "better"
        if not math.isfinite(self.second):
            return "same"
        return self.difference.verdict


@dataclasses.dataclass(frozen=True)
class StatusChange:
    """A cell that both have and that came to another end."""

    label: str
    first: Status
    second: Status
    error: str | None


@dataclasses.dataclass(frozen=True)
class OtherConclusion:
    """A comparison of both studies' tables that came out otherwise.

    Attributes:
        where: model and task.
        figure: the figure.
        arm: label of the arm.
        other: the baseline or the matched control that it is compared with.
        first: how it came out in the first run.
        second: how it came out in the second run.
    """

    where: str
    figure: str
    arm: str
    other: str
    first: Verdict
    second: Verdict


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What differs between two folders.

    Attributes:
        only_first: labels of cells that only the first has.
        only_second: labels of cells that only the second has.
        changed_content: labels of cells that both have by name, with other data, settings or weights behind it.
        statuses: cells that came to another end.
        changes: figures of cells that both finished, those that are told apart first.
        conclusions: comparisons with the baseline and with matched controls, within each run, that came out otherwise.
        shrunk: is one of the two a shrunk run, so that the comparison means nothing?
        environments: what differs in where they ran: name -> values of the first and the second.
    """

    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    changed_content: tuple[str, ...]
    statuses: tuple[StatusChange, ...]
    changes: tuple[Change, ...]
    conclusions: tuple[OtherConclusion, ...]
    shrunk: bool
    environments: dict[str, tuple[str, str]]

    @property
    def worse(self) -> int:
        """Figures that got worse and are told apart from before, and finished cells that now fail."""
        lost = sum(change.first == "done" and change.second == "failed" for change in self.statuses)
        return lost + sum(change.verdict == "worse" for change in self.changes)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON knows it; numbers that JSON lacks are null."""
        return {
            "worse": self.worse,
            "shrunk": self.shrunk,
            "only_first": list(self.only_first),
            "only_second": list(self.only_second),
            "changed_content": list(self.changed_content),
            "environments": {name: list(pair) for name, pair in self.environments.items()},
            "statuses": [dataclasses.asdict(change) for change in self.statuses],
            "conclusions": [dataclasses.asdict(each) for each in self.conclusions],
            "figures": [_plain(dataclasses.asdict(change) | {"verdict": change.verdict}) for change in self.changes],
        }


def compare_results(first: Results, second: Results) -> Comparison:
    """Compare two folders cell by cell.

    Cells belong together by their key, which means the same content; those that are left, by their names. Over items that
    both have, the difference is paired; without items, two figures are told apart where their intervals do not overlap.
    """
    pairs, rest = _paired(first, second)
    statuses, changes, changed = [], [], []
    for one, two in pairs:
        label, same = _label(two), one.key == two.key
        if not same:
            changed.append(label)
        if one.result.status != two.result.status:
            statuses.append(
                StatusChange(label, one.result.status, two.result.status, two.result.error or one.result.error)
            )
        if one.result.outcome is None or two.result.outcome is None:
            continue
        for name, figure in two.result.outcome.figures.items():
            found = contrast([one], [two], name)
            if found is not None:
                value = one.result.outcome.figures[name].value
                changes.append(
                    Change(label, name, value, figure.value, found, "same" if same else "changed", figure.unit)
                )
    changes.sort(key=_order)
    return Comparison(
        only_first=tuple(map(_label, rest[0])),
        only_second=tuple(map(_label, rest[1])),
        changed_content=tuple(changed),
        statuses=tuple(statuses),
        changes=tuple(changes),
        conclusions=_conclusions(first, second),
        shrunk=first.shrunk or second.shrunk,
        environments=_environments(first.cells, second.cells),
    )


def _conclusions(first: Results, second: Results) -> tuple[OtherConclusion, ...]:
    before = conclusions_of(first)
    pairs = [(before[place], now) for place, now in conclusions_of(second).items() if place in before]
    return tuple(
        OtherConclusion(*now.place, first=was.difference.verdict, second=now.difference.verdict)
        for was, now in pairs
        if was.difference.verdict != now.difference.verdict
    )


def _paired(first: Results, second: Results) -> tuple[list[tuple[Stored, Stored]], tuple[list[Stored], list[Stored]]]:
    by_key = {cell.key: cell for cell in first.cells}
    same = [(by_key[cell.key], cell) for cell in second.cells if cell.key in by_key]
    taken = {cell.key for _, cell in same}
    rest = [cell for cell in first.cells if cell.key not in taken], [c for c in second.cells if c.key not in taken]
    by_name = {_names(first, cell): cell for cell in rest[0]}
    named = [(by_name[_names(second, cell)], cell) for cell in rest[1] if _names(second, cell) in by_name]
    gone = {cell.key for pair in named for cell in pair}
    return same + named, ([c for c in rest[0] if c.key not in gone], [c for c in rest[1] if c.key not in gone])


def _names(results: Results, cell: Stored) -> tuple[Any, ...]:
    return cell.model, results.arms[cell.key].label, cell.task, cell.seed


def _label(cell: Stored) -> str:
    return cell.label


def _order(change: Change) -> tuple[Any, ...]:
    """What is told apart first, worse before better; then by how unlikely, and by how large."""
    ranks = {"worse": 0, "other": 1, "better": 2, "unsure": 3, "same": 4}
    found = change.difference
    p = 1.0 if found.p is None else found.p
    size = abs(found.value) / (abs(change.first) or 1.0) if math.isfinite(found.value) else math.inf
    return ranks[change.verdict], p, -size, change.label, change.figure


def _environments(first: Sequence[Stored], second: Sequence[Stored]) -> dict[str, tuple[str, str]]:
    """What no cell of one and no cell of the other have alike."""
    one, two = (_values(cells) for cells in (first, second))
    return {
        name: (" or ".join(sorted(one.get(name, {"–"}))), " or ".join(sorted(two.get(name, {"–"}))))
        for name in sorted(one.keys() | two.keys())
        if one.get(name) != two.get(name)
    }


def _values(cells: Sequence[Stored]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for cell in cells:
        for group, values in cell.result.environment.items():
            if group == "node":
                continue
            for name, value in values.items() if isinstance(values, dict) else [("", values)]:
                text = value if isinstance(value, str) else json.dumps(value, default=str)
                found.setdefault(f"{group}.{name}".rstrip("."), set()).add(text)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
