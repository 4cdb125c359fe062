"""A study's questions as tables: arms down, models and figures across, seeds together, each against the baseline."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sparing.study.contrast import Difference, Value, contrast, value_of
from sparing.study.results import Arm, Results, task_name
from sparing.study.store import Status, Stored


@dataclasses.dataclass(frozen=True)
class Column:
    """A figure of a task on a model. `figure` is empty where no cell has any figure, so that failures stay in sight."""

    model: str
    task: str
    figure: str
    better: str | None = None
    unit: str = ""


@dataclasses.dataclass(frozen=True)
class Against:
    """How an entry came out against a matched control.

    Attributes:
        arm: the control.
        cells: its cells, one a seed.
        value: their figure; `None` if no cell has it.
        difference: the entry minus its control; `None` where there is nothing to compare.
    """

    arm: Arm
    cells: tuple[Stored, ...]
    value: Value | None
    difference: Difference | None


@dataclasses.dataclass(frozen=True)
class Entry:
    """What stands in a table where an arm and a column meet.

    Attributes:
        cells: all that were run, one a seed.
        value: their figure; `None` if no cell has it.
        against: the difference to the baseline; `None` for the baseline itself and where there is nothing to compare.
        controls: how it came out against each of its matched controls.
        best: is it the best of its column, the baseline and what is no number aside?
    """

    cells: tuple[Stored, ...]
    value: Value | None = None
    against: Difference | None = None
    controls: tuple[Against, ...] = ()
    best: bool = False

    @property
    def states(self) -> dict[Status, int]:
        """What became of the cells: status -> how many."""
        return dict(Counter(cell.result.status for cell in self.cells))

    @property
    def errors(self) -> list[str]:
        """Why cells have no figures, each reason once."""
        return list(dict.fromkeys(cell.result.error or "" for cell in self.cells if cell.result.status != "done"))


@dataclasses.dataclass(frozen=True)
class Table:
    """The answer to a question.

    Attributes:
        ask: the question.
        columns: models and figures.
        rows: arms with one entry a column, in the study's order, controls last.
        missing: figures that were asked for and that no cell has.
    """

    ask: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Arm, tuple[Entry, ...]], ...]
    missing: tuple[str, ...] = ()

    def verdicts(self) -> Counter[str]:
        """How the comparisons with the baseline came out: verdict -> how many; those without an interval are left out."""
        return _counted([entry.against for _, entries in self.rows for entry in entries])

    def control_verdicts(self) -> Counter[str]:
        """How the comparisons with matched controls came out."""
        return _counted([each.difference for _, entries in self.rows for entry in entries for each in entry.controls])


def _counted(found: Sequence[Difference | None]) -> Counter[str]:
    return Counter(each.verdict for each in found if each is not None and each.low is not None)


def tables_of(results: Results) -> list[Table]:
    """A table for every question; without questions one a task, with its main figure."""
    grid = Grid(results)
    tasks = list(dict.fromkeys(task_name(cell.task) for cell in results.cells))
    questions: Sequence[Mapping[str, Any]] = results.about.get("questions") or [
        {"ask": task, "tasks": [task]} for task in tasks
    ]
    return [grid.table(question) for question in questions]


class Grid:
    """The cells by arm, model and task; contrasts are kept, because questions overlap.

    Args:
        results: of the study.
    """

    def __init__(self, results: Results) -> None:
        self._results = results
        self.arms = list(dict.fromkeys(results.arms[cell.key] for cell in results.cells))
        self.arms.sort(key=lambda arm: arm.control)
        self.baseline = next((arm for arm in self.arms if arm.baseline), None)
        self._cells: dict[tuple[Arm, str, str], list[Stored]] = {}
        for cell in results.cells:
            self._cells.setdefault((results.arms[cell.key], cell.model, cell.task), []).append(cell)
        self._contrasts: dict[tuple[Arm, Arm, Column], Difference | None] = {}

    def cells(self, arm: Arm, model: str, task: str) -> list[Stored]:
        """The cells of an arm, one a seed."""
        return self._cells.get((arm, model, task), [])

    def table(self, question: Mapping[str, Any]) -> Table:
        """The answer to a question, as the study's YAML has it."""
        columns = tuple(self._columns(question.get("tasks"), question.get("figures")))
        methods = question.get("methods")
        rows = []
        for arm in self.arms:
            if methods is None or arm.method in methods or arm.baseline:
                entries = tuple(self._entry(arm, column) for column in columns)
                if any(entry.cells for entry in entries):
                    rows.append((arm, entries))
        shown = {column.figure for column in columns}
        missing = tuple(figure for figure in question.get("figures") or () if figure not in shown)
        return Table(str(question["ask"]), columns, tuple(_with_best(rows, columns)), missing)

    def _columns(self, tasks: Sequence[str] | None, figures: Sequence[str] | None) -> list[Column]:
        places = list(dict.fromkeys((cell.model, cell.task) for cell in self._results.cells))
        models = list(dict.fromkeys(model for model, _ in places))
        found: list[Column] = []
        for model, task in sorted(places, key=lambda place: models.index(place[0])):
            if tasks is not None and task_name(task) not in tasks:
                continue
            done = [
                cell.result.outcome
                for cell in self._results.cells
                if (cell.model, cell.task) == (model, task) and cell.result.outcome is not None
            ]
            if not done:
                found.append(Column(model, task, ""))
                continue
            known = {name: figure for outcome in done for name, figure in outcome.figures.items()}
            for name in [done[0].main] if figures is None else figures:
                if name in known:
                    found.append(Column(model, task, name, known[name].better, known[name].unit))
        return found

    def _entry(self, arm: Arm, column: Column) -> Entry:
        cells = self.cells(arm, column.model, column.task)
        value = value_of(cells, column.figure)
        if value is None:
            return Entry(tuple(cells))
        against = None if self.baseline is None or arm.baseline else self._contrast(self.baseline, arm, column)
        controls = tuple(
            Against(control, tuple(theirs), value_of(theirs, column.figure), self._contrast(control, arm, column))
            for control in self._results.matched.get(arm, ())
            if (theirs := self.cells(control, column.model, column.task))
        )
        return Entry(tuple(cells), value, against, controls)

    def _contrast(self, other: Arm, arm: Arm, column: Column) -> Difference | None:
        """The second minus the first, in a column."""
        if (other, arm, column) not in self._contrasts:
            first, second = (self.cells(each, column.model, column.task) for each in (other, arm))
            self._contrasts[other, arm, column] = contrast(first, second, column.figure)
        return self._contrasts[other, arm, column]


def _with_best(
    rows: Sequence[tuple[Arm, tuple[Entry, ...]]], columns: Sequence[Column]
) -> list[tuple[Arm, tuple[Entry, ...]]]:
    """The rows with the best entries of their columns marked; ties share the mark."""
    marked = [(arm, list(entries)) for arm, entries in rows]
    for i, column in enumerate(columns):
        known = [
            (entries[i].value.value, entries)  # type: ignore[union-attr]
            for arm, entries in marked
            if not arm.baseline and entries[i].value is not None and math.isfinite(entries[i].value.value)  # type: ignore[union-attr]
        ]
        if column.better is None or len(known) < 2:
            continue
        best = (max if column.better == "higher" else min)(value for value, _ in known)
        for value, entries in known:
            if value == best:
                entries[i] = dataclasses.replace(entries[i], best=True)
    return [(arm, tuple(entries)) for arm, entries in marked]
