"""Rows of local data files, and values inside them."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


def read_rows(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Read JSON lines, a JSON list, or Parquet; the first two may be gzipped.

    Args:
        path: the file.
        limit: most rows to return.

    Raises:
        ValueError: no such file, another kind of file, a broken one, one without rows, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: expected at least 1 row, or none given for all")
    if not path.is_file():
        raise ValueError(f"the data {path} does not exist: name a file ({', '.join(ENDINGS)})")
    name = path.name.lower()
    if name.endswith(".parquet"):
        rows = _parquet(path)
    elif name.endswith(ENDINGS):
        rows = _json(path, lines="jsonl" in name)
    else:
        raise ValueError(f"the data {path} is none of {', '.join(ENDINGS)}: convert it to JSON lines")
    if not rows:
        raise ValueError(f"the data {path} has no rows")
    return rows[:limit]


def check_rows(path: Path) -> None:
    """Look whether a data file is there and can be read, without reading all of it where that is possible.

    Raises:
        ValueError: see `read_rows`.
    """
    read_rows(path, 1)


def value_of(row: Mapping[str, Any], field: str, where: str) -> Any:
    """The value of a field; dots go into lists and objects (`prompt.0.content`).

    Raises:
        ValueError: there is no such field.
    """
    if field in row:
        return row[field]
    value: Any = row
    for part in field.split("."):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (KeyError, IndexError, TypeError, ValueError):
            raise ValueError(f"{where} has no field {field!r}; it has {', '.join(map(str, row))}") from None
    return value


def _json(path: Path, *, lines: bool) -> list[dict[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            text = file.read().decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}): compress it again") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): convert it") from error
    rows: list[Any] = []
    # Not splitlines: a JSON string may hold other line ends as they are.
    parts = enumerate(text.split("\n"), 1) if lines else [(1, text)]
    for number, part in parts:
        if not part.strip():
            continue
        try:
            found = json.loads(part)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number if lines else error.lineno}: no JSON ({error.msg})") from error
        rows += found if not lines and isinstance(found, list) else [found]
    wrong = [i for i, row in enumerate(rows) if not isinstance(row, dict)]
    if wrong:
        raise ValueError(f"{path}, row {wrong[0] + 1}: expected an object, got {type(rows[wrong[0]]).__name__}")
    return rows


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is no Parquet file ({str(error).splitlines()[0]})") from error
