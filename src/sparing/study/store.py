"""A study's results: one SQLite file, each cell written as it comes, whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from sparing.evaluate.task import Figure, Outcome
from sparing.study.cells import Cell
from sparing.study.spec import Variant

# "spar": so that no other program's database is taken for ours.
APPLICATION = 0x73706172
VERSION = 1
Status = Literal["done", "failed", "not applicable"]

_TABLES = """
CREATE TABLE about(name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE environments(id TEXT PRIMARY KEY, content TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE cells(
  key TEXT PRIMARY KEY, subject TEXT NOT NULL, model TEXT NOT NULL, method TEXT NOT NULL, varied TEXT NOT NULL,
  training TEXT NOT NULL, task TEXT NOT NULL, seed INTEGER, content TEXT NOT NULL, status TEXT NOT NULL, error TEXT,
  traceback TEXT, started TEXT NOT NULL, seconds REAL NOT NULL, prepared REAL NOT NULL, details TEXT NOT NULL,
  environment TEXT NOT NULL REFERENCES environments(id)
) WITHOUT ROWID;
CREATE TABLE figures(
  cell TEXT NOT NULL REFERENCES cells(key) ON DELETE CASCADE, place INTEGER NOT NULL, name TEXT NOT NULL, value REAL,
  low REAL, high REAL, n INTEGER, better TEXT, unit TEXT NOT NULL, PRIMARY KEY(cell, name)
) WITHOUT ROWID;
CREATE TABLE items(
  cell TEXT NOT NULL REFERENCES cells(key) ON DELETE CASCADE, figure TEXT NOT NULL, item TEXT NOT NULL, score REAL,
  PRIMARY KEY(cell, figure, item)
) WITHOUT ROWID;
"""


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a cell.

    Attributes:
        status: `done`, `failed`, or `not applicable` (a method that cannot act on the model, a task it cannot be asked).
        outcome: what was measured; `None` unless done.
        error: why it failed, in a line.
        traceback: where it failed.
        seconds: seconds of the task.
        prepared: seconds of loading, method and training, if they were not shared with the cell before.
        started: when, ISO 8601 in UTC.
        details: what the method chose, and what the subject is.
        environment: versions, git state and hardware.
    """

    status: Status
    outcome: Outcome | None = None
    error: str | None = None
    traceback: str | None = None
    seconds: float = 0.0
    prepared: float = 0.0
    started: str = dataclasses.field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Stored:
    """A cell as it lies in the file, with its names and its result."""

    key: str
    subject: str
    model: str
    method: str
    varied: Mapping[str, Any]
    training: str
    task: str
    seed: int | None
    content: Mapping[str, Any]
    result: Result

    @property
    def label(self) -> str:
        """What it is, in a line."""
        said = ", ".join(f"{k}={v}" for k, v in self.varied.items())
        parts = [self.model, f"{self.method} ({said})" if said else self.method]
        parts += [self.training] if self.training != "none" else []
        parts += [self.task] + ([f"seed {self.seed}"] if self.seed is not None else [])
        return " · ".join(parts)


class Store:
    """The results of a study.

    Args:
        path: the SQLite file; made if it is not there and `create` says so.
        create: make it.
        patience: seconds to wait for another program that holds the file.

    Raises:
        ValueError: not there, of another program or another version, damaged, or locked; the message says what to do.
    """

    def __init__(self, path: Path, *, create: bool = False, patience: float = 10.0) -> None:
        self.path, self.patience = path, patience
        if not path.exists() and not create:
            raise ValueError(f"{path} does not exist: run the study first, or name its folder")
        if path.is_dir():
            raise ValueError(f"{path} is a folder: name the folder that holds the study's results.sqlite")
        with self._told():
            self._base = sqlite3.connect(path, timeout=patience, isolation_level=None)
            self._base.execute("PRAGMA foreign_keys = ON")
            # A result is on the disk before its cell counts as done.
            self._base.execute("PRAGMA synchronous = FULL")
            self._check(create)

    def _check(self, create: bool) -> None:
        (application,), (version,) = (
            self._base.execute(f"PRAGMA {what}").fetchone() for what in ("application_id", "user_version")
        )
        if (application, version) == (APPLICATION, VERSION):
            return
        (tables,) = self._base.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application == 0 and version == 0 and tables == 0:
            if not create:
                raise ValueError(f"{self.path} has no results yet: run the study, or wait until its run has begun")
            with self._transaction():
                # Another process may have been quicker.
                if not self._base.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    for statement in filter(str.strip, _TABLES.split(";")):
                        self._base.execute(statement)
                    self._base.execute(f"PRAGMA application_id = {APPLICATION}")
                    self._base.execute(f"PRAGMA user_version = {VERSION}")
            return
        if application != APPLICATION:
            raise ValueError(f"{self.path} holds no results of a study: move it away, or choose another folder")
        age = "newer" if version > VERSION else "older"
        raise ValueError(
            f"{self.path} was written by {'a' if age == 'newer' else 'an'} {age} sparing (results version {version}, "
            f"expected {VERSION}): use that version, or choose another folder"
        )

    def close(self) -> None:
        """Let go of the file."""
        self._base.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Writing -------------------------------------------------------------------------------------------------------

    def put(self, cell: Cell, result: Result) -> None:
        """Keep a cell's result; an earlier one of the same cell gives way."""
        environment = json.dumps(_finite(result.environment), sort_keys=True)
        place = hashlib.sha256(environment.encode()).hexdigest()[:16]
        content = {
            "checkpoint": cell.checkpoint.model_dump(),
            "method": _described(cell.method),
            "training": None if cell.training is None else _described(cell.training),
            "task": _described(cell.task),
            "shrink": cell.shrink,
        }
        outcome = result.outcome
        details = {**result.details, "outcome": outcome.details if outcome else {}}
        varied = {**cell.method.varied, **(cell.training.varied if cell.training else {})}
        with self._told(), self._transaction():
            run = self._base.execute
            run("INSERT OR IGNORE INTO environments VALUES(?, ?)", (place, environment))
            run("DELETE FROM cells WHERE key = ?", (cell.key,))
            run(
                f"INSERT INTO cells VALUES({', '.join('?' * 17)})",
                (
                    cell.key,
                    cell.subject,
                    cell.model,
                    cell.method.name,
                    json.dumps(_finite(varied), default=str),
                    cell.training.name if cell.training else "none",
                    cell.task.label,
                    cell.seed,
                    json.dumps(_finite(content), default=str),
                    result.status,
                    result.error,
                    result.traceback,
                    result.started,
                    result.seconds,
                    result.prepared,
                    json.dumps(_finite(details), default=str),
                    place,
                ),
            )
            if outcome is None:
                return
            self._base.executemany(
                "INSERT INTO figures VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (cell.key, i, name, f.value, f.low, f.high, f.n, f.better, f.unit)
                    for i, (name, f) in enumerate(outcome.figures.items())
                ],
            )
            self._base.executemany(
                "INSERT INTO items VALUES(?, ?, ?, ?)",
                [(cell.key, fig, item, s) for fig, scores in outcome.items.items() for item, s in scores.items()],
            )

    def describe(self, **about: Any) -> None:
        """Keep facts on the study itself, as JSON knows them."""
        with self._told(), self._transaction():
            for name, value in about.items():
                self._base.execute("INSERT OR REPLACE INTO about VALUES(?, ?)", (name, json.dumps(value, default=str)))

    # Reading -------------------------------------------------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        """The facts on the study itself."""
        return {name: json.loads(value) for name, value in self._rows("SELECT name, value FROM about")}

    def statuses(self) -> dict[str, Status]:
        """What became of each cell that was run: key -> status."""
        return dict(self._rows("SELECT key, status FROM cells"))

    def seconds(self) -> dict[tuple[str, str], list[float]]:
        """Seconds that finished cells took: (model, task) -> one each, preparing included."""
        found: dict[tuple[str, str], list[float]] = {}
        rows = self._rows("SELECT model, task, seconds + prepared FROM cells WHERE status = 'done'")
        for model, task, seconds in rows:
            found.setdefault((model, task), []).append(seconds)
        return found

    def cells(self, keys: Sequence[str] | None = None, *, items: bool = True) -> list[Stored]:
        """The cells with their results, in the order of `keys`, or all by name.

        Args:
            keys: which ones; those that have not been run are left out.
            items: with the scores of single items.
        """
        with self._told(), self._transaction("DEFERRED"):
            return self._cells(keys, items=items)

    def _cells(self, keys: Sequence[str] | None, *, items: bool) -> list[Stored]:
        environments = {place: json.loads(text) for place, text in self._rows("SELECT id, content FROM environments")}
        figures: dict[str, dict[str, Figure]] = {}
        for cell, name, value, low, high, n, better, unit in self._rows(
            "SELECT cell, name, value, low, high, n, better, unit FROM figures ORDER BY cell, place"
        ):
            figures.setdefault(cell, {})[name] = Figure(_number(value), low, high, n, better, unit)
        scores: dict[str, dict[str, dict[str, float]]] = {}
        if items:
            for cell, figure, item, score in self._rows("SELECT cell, figure, item, score FROM items"):
                scores.setdefault(cell, {}).setdefault(figure, {})[item] = _number(score)
        found = {}
        for row in self._rows("SELECT * FROM cells ORDER BY model, method, varied, training, task, seed"):
            key, details = row[0], json.loads(row[15])
            outcome = None
            if row[9] == "done":
                outcome = Outcome(figures[key], scores.get(key, {}), details.pop("outcome", {}))
            details.pop("outcome", None)
            result = Result(
                status=row[9],
                outcome=outcome,
                error=row[10],
                traceback=row[11],
                started=row[12],
                seconds=row[13],
                prepared=row[14],
                details=details,
                environment=environments[row[16]],
            )
            found[key] = Stored(
                key, row[1], row[2], row[3], json.loads(row[4]), row[5], row[6], row[7], json.loads(row[8]), result
            )
        return list(found.values()) if keys is None else [found[key] for key in keys if key in found]

    # SQLite --------------------------------------------------------------------------------------------------------

    def _rows(self, query: str) -> list[Any]:
        with self._told():
            return self._base.execute(query).fetchall()

    @contextlib.contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[None]:
        self._base.execute(f"BEGIN {kind}")
        try:
            yield
            self._base.execute("COMMIT")
        except BaseException:
            # On a full disk SQLite may have rolled back by itself.
            if self._base.in_transaction:
                self._base.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Word what SQLite says."""
        try:
            yield
        except sqlite3.Error as error:
            said = str(error)
            if "locked" in said or "busy" in said:
                why = f"is locked by another program (waited {self.patience:g} s): close that program, or stop the other run"
            elif "not a database" in said or "malformed" in said:
                why = "is no SQLite file, or is damaged: move it away, or choose another folder"
            elif "full" in said:
                why = "cannot be written, no space left on the disk: what it holds is whole; free space and resume"
            elif "disk I/O" in said:
                why = "cannot be read or written (disk I/O error, perhaps no space left): look at the disk, and resume"
            elif "readonly" in said or "unable to open" in said:
                why = "may not be written to: choose another folder"
            else:
                why = f"cannot be used ({said})"
            raise ValueError(f"{self.path} {why}") from error


def _described(variant: Variant) -> dict[str, Any]:
    """A variant with its settings as they were in force: `--shrink` makes some smaller than they were written."""
    return {
        "use": variant.use,
        "with": {name: getattr(variant.does, name, written) for name, written in variant.settings.items()},
    }


def _number(value: float | None) -> float:
    """SQLite keeps NaN as NULL."""
    return math.nan if value is None else value


def _finite(value: Any) -> Any:
    """`value` with numbers that JSON lacks as words."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
