"""What a study's page shows of single cells: embedded once, small enough for a thousand of them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sparing.study.results import Results
from sparing.study.store import Stored

# Characters that all cells' details and tracebacks together may take; what is longer is shortened, the store has all of it.
BUDGET = 3_000_000
LEAST, MOST = 600, 20_000
TRACEBACK = 6_000
BINS = 12
SHORTENED = "… (shortened: results.sqlite has all of it)"


class Interned:
    """Each different thing once, by its place in a list."""

    def __init__(self) -> None:
        self.things: list[Any] = []
        self._places: dict[str, int] = {}

    def place(self, thing: Any) -> int:
        """Where the thing is in the list; it is added if it is new."""
        name = json.dumps(thing, sort_keys=True, default=str)
        if name not in self._places:
            self._places[name] = len(self.things)
            self.things.append(thing)
        return self._places[name]


def cells_data(results: Results) -> dict[str, Any]:
    """Every cell with its settings, figures, scores and errors, as strict JSON."""
    share = max(LEAST, min(MOST, BUDGET // max(1, len(results.cells))))
    settings, environments, texts = Interned(), Interned(), Interned()
    cells = [_cell(results, cell, share, settings, environments, texts) for cell in results.cells]
    return strict(
        {"cells": cells, "settings": settings.things, "environments": environments.things, "texts": texts.things}
    )


def _cell(
    results: Results, cell: Stored, share: int, settings: Interned, environments: Interned, texts: Interned
) -> dict[str, Any]:
    result, outcome = cell.result, cell.result.outcome
    figures, items = {}, {}
    details = {**result.details}
    if outcome is not None:
        figures = {
            name: [_short(f.value), _short(f.low), _short(f.high), f.n, f.better, f.unit]
            for name, f in outcome.figures.items()
        }
        items = {name: summary(list(scores.values())) for name, scores in outcome.items.items() if scores}
        details["outcome"] = outcome.details
    return {
        "key": cell.key,
        "subject": cell.subject,
        "model": cell.model,
        "arm": results.arms[cell.key].label,
        "task": cell.task,
        "seed": cell.seed,
        "status": result.status,
        "started": result.started,
        "seconds": _short(result.seconds),
        "prepared": _short(result.prepared),
        "settings": {
            part: settings.place(cell.content[part])
            for part in ("checkpoint", "method", "training", "task")
            if cell.content.get(part) is not None
        },
        "environment": environments.place(result.environment),
        "figures": figures,
        "items": items,
        "details": bounded({name: value for name, value in details.items() if value}, share),
        "error": result.error and _cut(result.error, 2_000),
        "traceback": result.traceback and texts.place(result.traceback[-TRACEBACK:]),
    }


def summary(scores: Sequence[float]) -> dict[str, Any]:
    """How single items scored: count, extremes, quartiles, and a histogram of equal bins."""
    known = sorted(score for score in scores if math.isfinite(score))
    found: dict[str, Any] = {"n": len(scores), "no_number": len(scores) - len(known)}
    if not known:
        return found
    low, high = known[0], known[-1]
    quartiles = statistics.quantiles(known, n=4, method="inclusive") if len(known) > 1 else [low] * 3
    bins = [0] * BINS
    for score in known:
        bins[min(BINS - 1, int((score - low) / (high - low) * BINS)) if high > low else 0] += 1
    return found | {
        "mean": _short(statistics.fmean(known)),
        "min": _short(low),
        "quartiles": [_short(q) for q in quartiles],
        "max": _short(high),
        "bins": bins if high > low else [len(known)],
    }


def bounded(value: Any, size: int) -> Any:
    """`value` with long texts and lists shortened until it takes at most `size` characters as JSON, more or less."""
    for text, entries in ((4_000, 200), (800, 40), (240, 12), (120, 6), (60, 3)):
        found = _shortened(value, text, entries)
        if len(json.dumps(found, default=str)) <= size:
            return found
    return {"": SHORTENED}


def _shortened(value: Any, text: int, entries: int) -> Any:
    if isinstance(value, str):
        return _cut(value, text)
    if isinstance(value, Mapping):
        kept = {_cut(str(k), text): _shortened(v, text, entries) for k, v in list(value.items())[:entries]}
        return kept if len(value) <= entries else {**kept, "…": f"{len(value) - entries} more"}
    if isinstance(value, (list, tuple)):
        kept = [_shortened(inner, text, entries) for inner in value[:entries]]
        return kept if len(value) <= entries else [*kept, f"… {len(value) - entries} more"]
    return value


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + SHORTENED


def _short(value: float | None) -> float | None:
    """Seven digits are enough to read, and a third of the bytes."""
    return value if value is None or not math.isfinite(value) else float(f"{value:.7g}")


def strict(value: Any) -> Any:
    """`value` as every JSON parser reads it: numbers that JSON lacks as words."""
    if isinstance(value, Mapping):
        return {str(key): strict(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    return value
