"""The study's `report.html`: one file that asks for nothing, from the question down to the single cell."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparing.study.conclusions import in_words
from sparing.study.contrast import Difference
from sparing.study.fronts import fronts_of
from sparing.study.pages import numbers, scatter
from sparing.study.pages.document import page_environment, write_page
from sparing.study.pages.drill_down import cells_data, strict
from sparing.study.results import Arm, Results
from sparing.study.store import Stored
from sparing.study.tables import Column, Entry, Table, tables_of

# A table of one column has room for a drawing beside each value, so wide.
STRIP = 200
VERDICTS = {"better": "better", "worse": "worse", "other": "differs", "same": "same", "unsure": "≈"}


def write_study_report(results: Results, path: Path) -> None:
    """Write the report so that `path` holds all of it or what it held before.

    Args:
        results: of the study, with items.
        path: the `.html` file.
    """
    write_page(render_study(results), path)


def render_study(results: Results) -> str:
    """The report as HTML. Everything that comes from a study, a model or a text is escaped."""
    cells = {cell.key: i for i, cell in enumerate(results.cells)}
    links = _Links(cells)
    tables = [_table(table, links, results) for table in tables_of(results)]
    fronts = _fronts(results, links)
    counted = sum((table[each] for table in tables for each in ("verdicts", "control_verdicts")), Counter())
    counts = Counter(cell.result.status for cell in results.cells)
    environment = page_environment()
    environment.filters.update(duration=numbers.duration, in_words=in_words)
    return environment.get_template("study.html.j2").render(
        results=results,
        about=str(results.about.get("about", "")).strip(),
        counts=counts,
        total=len(results.cells) + len(results.pending),
        seconds=sum(cell.result.seconds + cell.result.prepared for cell in results.cells),
        when=_when(results.cells),
        environments=environments_of(results.cells),
        tables=tables,
        compared=sum(counted.values()),
        told_apart=sum(counted[verdict] for verdict in ("better", "worse", "other")),
        controlled=any(table["control_verdicts"] for table in tables),
        fronts=fronts,
        trouble=_trouble(results.cells, links),
        baseline=next((arm for arm in results.arms.values() if arm.baseline), None),
        data=strict({**cells_data(results), "entries": links.entries}),
    )


class _Links:
    """What a click opens: cells, and the words above them."""

    def __init__(self, cells: Mapping[str, int]) -> None:
        self._cells = cells
        self.entries: list[dict[str, Any]] = []
        self._places: dict[str, int] = {}

    def place(
        self,
        cells: Sequence[Stored],
        title: str,
        figure: str = "",
        said: Sequence[str] = (),
        more: Sequence[tuple[str, Sequence[Stored]]] = (),
    ) -> int:
        """The number of an entry; `more` are cells to look at beside it, with a heading."""
        entry = {
            "cells": self._numbers(cells),
            "title": title,
            "figure": figure,
            "said": list(said),
            "more": [{"title": heading, "cells": self._numbers(theirs)} for heading, theirs in more],
        }
        name = json.dumps(entry, sort_keys=True)
        if name not in self._places:
            self._places[name] = len(self.entries)
            self.entries.append(entry)
        return self._places[name]

    def _numbers(self, cells: Sequence[Stored]) -> list[int]:
        return [self._cells[cell.key] for cell in cells]


# Tables ----------------------------------------------------------------------------------------------------------------


def _table(table: Table, links: _Links, results: Results) -> dict[str, Any]:
    few = len(table.columns) == 1
    strips = [strips_of([(arm.baseline, entries[i]) for arm, entries in table.rows]) for i in range(len(table.columns))]
    rows = [
        {
            "arm": arm,
            "controls": [control.label for control in results.matched.get(arm, ())],
            "entries": [
                _entry(entry, column, f"{column.model} · {arm.label}", links, results)
                | ({"strip": strips[i][row]} if few else {})
                for i, (entry, column) in enumerate(zip(entries, table.columns, strict=True))
            ],
        }
        for row, (arm, entries) in enumerate(table.rows)
    ]
    return {
        "ask": table.ask,
        "columns": [_heading(column, table.columns) for column in table.columns],
        "models": _spans([column.model for column in table.columns]),
        "tasks": _spans([(column.model, column.task) for column in table.columns]),
        "groups": [
            ("", [row for row in rows if not row["arm"].control]),
            ("controls: what the others must beat", [row for row in rows if row["arm"].control]),
        ],
        "missing": table.missing,
        "verdicts": table.verdicts(),
        "control_verdicts": table.control_verdicts(),
    }


def strips_of(column: Sequence[tuple[bool, Entry]]) -> list[dict[str, Any] | None]:
    """A column's values and intervals on one scale, to be seen at a glance.

    Args:
        column: of each row, whether it is the baseline, and its entry.

    Returns:
        One a row: pixels of the value, of its interval, of the baseline and of its matched controls; `None` without a finite
        value.
    """
    known = [entry.value for _, entry in column if entry.value is not None and math.isfinite(entry.value.value)]
    if len(known) < 2:
        return [None] * len(column)
    place = scatter.scale(known, 6, STRIP - 6)
    base = next((entry.value.value for is_base, entry in column if is_base and entry.value is not None), math.nan)
    return [
        None
        if (value := entry.value) is None or not math.isfinite(value.value)
        else {
            "at": place(value.value),
            "low": None if value.low is None else place(value.low),
            "high": None if value.high is None else place(value.high),
            "base": place(base) if math.isfinite(base) else None,
            "controls": [
                place(each.value.value)
                for each in entry.controls
                if each.value is not None and math.isfinite(each.value.value)
            ],
        }
        for _, entry in column
    ]


def _heading(column: Column, columns: Sequence[Column]) -> dict[str, Any]:
    arrow = {"higher": "↑", "lower": "↓"}.get(column.better or "", "")
    unit = "" if numbers.is_share(column.unit) else column.unit
    # Where every column is of one figure, the task says it all.
    return {"name": column.figure or "–", "arrow": arrow, "better": column.better, "unit": unit}


def _spans(values: Sequence[Any]) -> list[tuple[Any, int]]:
    """Equal neighbours together: value and how many."""
    found: list[tuple[Any, int]] = []
    for value in values:
        if found and found[-1][0] == value:
            found[-1] = value, found[-1][1] + 1
        else:
            found.append((value, 1))
    return found


def _entry(entry: Entry, column: Column, where: str, links: _Links, results: Results) -> dict[str, Any]:
    failed, absent = entry.states.get("failed", 0), entry.states.get("not applicable", 0)
    notes = [f"{failed} failed"] if failed else []
    notes += [f"{absent} not applicable"] if absent else []
    begin = f"{where} · {column.task}"
    waiting = sum(label == begin or label.startswith(f"{begin} · seed ") for label in results.pending)
    notes += [f"{waiting} to run"] if waiting else []
    found: dict[str, Any] = {"state": "", "notes": notes, "best": entry.best, "sort": None, "link": None}
    if not entry.cells:
        return found | {"state": "to run" if waiting else ""}
    said = []
    if entry.value is None:
        found["state"] = "failed" if failed else "n.a." if absent else "no figure"
        found["notes"] = notes if len(entry.cells) > 1 else []
        said = entry.errors
    else:
        value, unit, name = entry.value, column.unit, column.figure
        if value.not_numbers and len(value.seeds) > 1:
            notes.append(f"{value.not_numbers} not a number")
        found |= {
            "state": "value",
            "sort": value.value,
            "value": numbers.number(value.value, unit, name),
            "interval": numbers.interval(value.low, value.high, unit, name),
            "seeds": len(value.seeds) if len(value.seeds) > 1 else 0,
        }
        said = [f"{name}: {numbers.whole(value, name)}"]
        if entry.against is not None:
            said.append(f"against the baseline: {numbers.difference(entry.against, unit, name)}")
            found["against"] = _difference(entry.against, column)
        found["controls"] = []
        for each in entry.controls:
            if each.difference is None:
                said.append(f"against its control {each.arm.label}: that one has no figure")
                continue
            said.append(f"against its control {each.arm.label}: {numbers.difference(each.difference, unit, name)}")
            found["controls"].append(_difference(each.difference, column) | {"name": each.arm.method})
        said += entry.errors
    more = [(f"its control: {each.arm.label}", each.cells) for each in entry.controls]
    found["link"] = links.place(entry.cells, begin, column.figure, said, more)
    found["title"] = "\n".join(said)
    return found


def _difference(found: Difference, column: Column) -> dict[str, str]:
    """A difference as it stands in a table: its verdict, the word for that, and the number."""
    known = found.low is not None
    return {
        "verdict": found.verdict if known else "untested",
        "word": VERDICTS[found.verdict] if known else "",
        "number": "" if math.isnan(found.value) else numbers.signed(found.value, column.unit, column.figure),
    }


# Charts ----------------------------------------------------------------------------------------------------------------


def _fronts(results: Results, links: _Links) -> list[dict[str, Any]]:
    found = []
    of_arm: dict[tuple[Arm, str], list[Stored]] = {}
    for cell in results.cells:
        of_arm.setdefault((results.arms[cell.key], cell.model), []).append(cell)
    for front in fronts_of(results):
        styles = scatter.styles_of([point for chart in front.charts for point in chart.points])
        charts = []
        for chart in front.charts:
            drawn = scatter.geometry(front, chart, styles)
            for place in drawn["points"]:
                arm = place["point"].arm
                cells = [cell for cell in of_arm[arm, front.model] if cell.task in (front.task, chart.axis.task)]
                title = f"{front.model} · {arm.label} · {front.task}"
                place["link"] = links.place(cells, title, front.figure, place["said"])
            charts.append({"chart": chart, "name": scatter.axis_words(chart), "drawn": drawn})
        found.append({"front": front, "charts": charts, "styles": styles})
    return found


# Troubles, and where it ran --------------------------------------------------------------------------------------------


def _trouble(cells: Sequence[Stored], links: _Links) -> list[dict[str, Any]]:
    """Failures and cells that could not be asked, by reason; failures first."""
    groups: dict[tuple[str, str], list[Stored]] = {}
    for cell in cells:
        if cell.result.status != "done":
            groups.setdefault((cell.result.status, cell.result.error or "no reason is known"), []).append(cell)
    return [
        {
            "status": status,
            "error": error,
            "cells": [(cell.label, links.place([cell], cell.label, "", [error])) for cell in found],
            "traceback": found[0].result.traceback,
        }
        for (status, error), found in sorted(
            groups.items(), key=lambda group: (group[0][0] != "failed", -len(group[1]))
        )
    ]


def environments_of(cells: Sequence[Stored]) -> dict[str, Any]:
    """What all cells ran on alike, and what differs between them.

    Returns:
        `same`: name -> value; `differing`: name -> value -> how many cells; `nodes`: node of a cluster -> how many cells;
        `timed`: do cells differ that measured seconds?
    """
    nodes = Counter(cell.result.environment["node"] for cell in cells if "node" in cell.result.environment)
    # Another machine of the same kind is no other set-up.
    flat = [(_flat({k: v for k, v in cell.result.environment.items() if k != "node"}), cell) for cell in cells]
    names = list(dict.fromkeys(name for found, _ in flat for name in found))
    same, differing = {}, {}
    for name in names:
        values = Counter(str(found.get(name, "–")) for found, _ in flat)
        if len(values) == 1:
            same[name] = next(iter(values))
        else:
            differing[name] = dict(values.most_common())
    clocked = [
        json.dumps(cell.result.environment.get("hardware"), sort_keys=True, default=str)
        for _, cell in flat
        if cell.result.outcome
        and any("seconds" in f.unit or "speed-up" in n for n, f in cell.result.outcome.figures.items())
    ]
    return {"same": same, "differing": differing, "nodes": dict(nodes), "timed": len(set(clocked)) > 1}


def _flat(value: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            found |= _flat(inner, f"{before}{name}.")
        else:
            found[f"{before}{name}"] = (
                ", ".join(map(str, inner)) or "none" if isinstance(inner, (list, tuple)) else inner
            )
    return found


def _when(cells: Sequence[Stored]) -> str:
    """The first and the last day."""
    started = sorted(cell.result.started for cell in cells)
    if not started:
        return ""
    first, last = (text[:16].replace("T", " ") for text in (started[0], started[-1]))
    return f"{first} UTC" if first == last else f"{first} – {last[11:] if last[:10] == first[:10] else last} UTC"
