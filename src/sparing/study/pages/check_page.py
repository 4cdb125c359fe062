"""The check-up's `check.html`: one file that asks for nothing, in the look of the profile's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparing.evaluate.checkup import MEANINGS
from sparing.study.pages.document import plain, render_record, write_page

COLUMNS = (
    ("dense = gathered", "same result"),
    ("padding", "padding"),
    ("generate()", "generate"),
    ("cached decoding", "cache"),
    ("saved", "saved"),
    ("speed and memory", "speed"),
)
MARKS = {"ok": "✓", "slow": "!", "fails": "✗", "not applicable": "–"}
LEFT, WIDTH, ROW = 130, 960, 40


def write_check(figures: Mapping[str, Any], run: Mapping[str, Any], path: Path) -> None:
    """Write the page so that `path` holds all of it or what it held before.

    Args:
        figures: `Checkup.as_dict()`, or the `figures` of a check's `run.json`.
        run: the run's record: command, versions, hardware.
        path: the `.html` file.
    """
    write_page(render_check(figures, run), path)


def render_check(figures: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """The page as HTML. Everything that comes from a model is escaped."""
    f = plain(figures)
    groups: dict[str, list[dict[str, Any]]] = {}
    for finding in f["findings"]:
        groups.setdefault(finding["subject"], []).append(finding)
    rows = [_row(name, entry, groups.get(name, [])) for name, entry in f["policies"].items()]
    counts = {verdict: sum(x["verdict"] == verdict for x in f["findings"]) for verdict in MARKS}
    return render_record(
        "check.html.j2",
        f,
        run,
        {"short": _short},
        groups=groups,
        rows=rows,
        columns=COLUMNS,
        meanings=MEANINGS,
        seen=[name for name in MEANINGS if any(x["name"] == name for x in f["findings"])],
        marks=MARKS,
        counts=counts,
        speed=_speed([row for row in rows if row["speed"]]),
    )


def _short(value: float) -> str:
    """0.0001 -> 1e-4, in one piece."""
    return f"{value:.0e}".replace("e-0", "e\N{NON-BREAKING HYPHEN}")


def _row(name: str, entry: Mapping[str, Any], findings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A policy's line of the table."""
    by_name = {finding["name"]: finding for finding in findings}
    speed = by_name.get("speed and memory", {}).get("numbers") or None
    known = [by_name.get(column) for column, _ in COLUMNS]
    others = [finding for finding in findings if finding["name"] not in dict(COLUMNS)]
    runs: dict[str, list[Any]] = {}
    for run in (speed or {}).get("runs", []):
        runs.setdefault(run["policy"], []).append(run)
    return {"name": name, **entry, "runs": runs, "cells": known, "others": others, "speed": speed}


def _speed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Bars of the measured ratios with a tick where the operations alone would put them."""
    if not rows:
        return None
    both = ("prefill", "decode")
    most = 1.08 * max(1.2, *(max(row["speed"][p], row["speed"][f"{p}_by_count"]) for row in rows for p in both))

    def x(ratio: float) -> float:
        return round(LEFT + (WIDTH - LEFT - 60) * ratio / most, 1)

    bars = [
        {
            "name": row["name"],
            "phase": phase,
            "y": 30 + ROW * i + 15 * j,
            "end": x(row["speed"][phase]),
            "count": x(row["speed"][f"{phase}_by_count"]),
            "ratio": row["speed"][phase],
            "by_count": row["speed"][f"{phase}_by_count"],
        }
        for i, row in enumerate(rows)
        for j, phase in enumerate(both)
    ]
    return {
        "width": WIDTH,
        "height": 34 + ROW * len(rows),
        "left": LEFT,
        "one": x(1),
        "bars": bars,
        "ticks": [{"x": x(tick), "label": f"{tick:g}×"} for tick in _ticks(most)],
    }


def _ticks(most: float) -> list[float]:
    """Round ratios up to the largest."""
    step = next(step for step in (0.25, 0.5, 1, 2, 5, 10, 50, 1000) if most / step <= 8 or step == 1000)
    return [step * i for i in range(int(most / step) + 1)]
