"""A study's results as tables for other programs: CSV or Parquet, one row a figure, or one row an item."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparing.study.results import Results

if TYPE_CHECKING:
    import pyarrow as pa

Format = Literal["csv", "parquet"]


def export(results: Results, folder: Path, *, format: Format = "csv", items: bool = False) -> list[Path]:
    """Write `figures.csv` or `figures.parquet`, and `items` beside it if asked; each file whole or not at all.

    Args:
        results: of the study; read with items if these are wanted.
        folder: where to; made if it is not there.
        format: of the files.
        items: write the scores of single items too.

    Returns:
        The files.

    Raises:
        ValueError: there are no results.
    """
    if not results.cells:
        raise ValueError(f"{results.folder} has no results yet: run the study first")
    folder.mkdir(parents=True, exist_ok=True)
    tables = {"figures": figures_table(results)} | ({"items": items_table(results)} if items else {})
    return [_write(table, folder / f"{name}.{format}", format) for name, table in tables.items()]


def figures_table(results: Results) -> pa.Table:
    """One row a cell and figure, with every setting in a column of its own; a cell without figures has one row without."""
    rows = []
    for cell in results.cells:
        result, outcome = cell.result, cell.result.outcome
        names: dict[str, Any] = {
            "study": results.name,
            "cell": cell.key,
            "subject": cell.subject,
            "model": cell.model,
            "arm": results.arms[cell.key].label,
            "method": cell.method,
            "training": cell.training,
            "task": cell.task,
            "seed": cell.seed,
            "baseline": results.arms[cell.key].baseline,
            "control": results.arms[cell.key].control,
            "matched_control": "; ".join(arm.label for arm in results.matched.get(results.arms[cell.key], ())) or None,
            "shrunk": bool(cell.content.get("shrink")),
            "status": result.status,
            "error": result.error,
            "started": result.started,
            "seconds": float(result.seconds),
            "prepared": float(result.prepared),
        }
        settings = {name: part for name, part in cell.content.items() if name != "shrink"}
        more = (
            _flat(settings)
            | _flat({"environment": result.environment})
            | _flat({"chosen": result.details.get("method", {})})
        )
        for i, (name, figure) in enumerate(outcome.figures.items() if outcome else [("", None)]):
            rows.append(
                {
                    **names,
                    "figure": name or None,
                    "main": i == 0 if figure else None,
                    "value": figure and float(figure.value),
                    "low": figure and figure.low,
                    "high": figure and figure.high,
                    "n": figure and figure.n,
                    "better": figure and figure.better,
                    "unit": figure and figure.unit,
                    **more,
                }
            )
    return _table(rows)


def items_table(results: Results) -> pa.Table:
    """One row a cell, figure and item."""
    import pyarrow as pa

    columns: dict[str, list[Any]] = {
        name: [] for name in ("cell", "model", "arm", "method", "training", "task", "seed", "figure", "item", "score")
    }
    for cell in results.cells:
        if cell.result.outcome is None:
            continue
        for figure, scores in cell.result.outcome.items.items():
            arm = results.arms[cell.key].label
            same = (cell.key, cell.model, arm, cell.method, cell.training, cell.task, cell.seed, figure)
            for name, value in zip(columns, same, strict=False):
                columns[name] += [value] * len(scores)
            columns["item"] += list(scores)
            columns["score"] += map(float, scores.values())
    types = {"seed": pa.int64(), "score": pa.float64()}
    return pa.table({name: pa.array(values, types.get(name, pa.string())) for name, values in columns.items()})


def _flat(value: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested settings as `method.with.budget`; lists as JSON."""
    found: dict[str, Any] = {}
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            found |= _flat(inner, f"{before}{name}.")
        else:
            found[before + name] = json.dumps(inner, default=str) if isinstance(inner, (list, tuple)) else inner
    return found


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    import pyarrow as pa

    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: Sequence[Any]) -> pa.Array:
    """One type a column: the values' own, floats where there are whole numbers too, else text."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return pa.array([None if value is None else float(value) for value in values], pa.float64())
    if len(kinds) > 1 or not kinds <= {bool, int, float, str}:
        return pa.array([value if value is None or isinstance(value, str) else json.dumps(value) for value in values])
    return pa.array(
        values, {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}.get(next(iter(kinds), str), pa.string())
    )


def _write(table: pa.Table, path: Path, format: Format) -> Path:
    from pyarrow import csv, parquet

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if format == "csv":
            csv.write_csv(table, temporary)
        else:
            parquet.write_table(table, temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path
