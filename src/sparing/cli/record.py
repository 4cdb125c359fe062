"""`run.json`: what a command ran, on what, and what came out."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from sparing.cli.errors import Interrupted

Status = Literal["running", "finished", "interrupted", "failed"]


class RunRecord:
    """Keeps `run.json` in an output folder while a command works there.

    The file is written on entry (`status: running`, which a killed process leaves behind), on every `write`,
    and on exit. A command that resumes in the folder of an earlier one lists that one under `earlier`.

        with RunRecord(out, config={"ratio": 0.5}, seed=0) as record:
            record.figures["speedup"] = 1.8

    Args:
        out: output folder; made if needed.
        config: the command's options.
        seed: the command's seed, if it has one.

    Raises:
        NotADirectoryError: `out` is a file.
        ValueError: `out` holds a `run.json` that cannot be read.
        Interrupted: raised on exit in place of a `KeyboardInterrupt`, naming the folder.
    """

    def __init__(self, out: Path, *, config: Mapping[str, Any], seed: int | None = None) -> None:
        self.path = out / "run.json"
        self.config = dict(config)
        self.seed = seed
        self.figures: dict[str, Any] = {}
        self.status: Status = "running"

    def __enter__(self) -> RunRecord:
        """Make the folder and write the first record."""
        out = self.path.parent
        if out.exists() and not out.is_dir():
            raise NotADirectoryError(f"--out {out} is a file: name a folder")
        out.mkdir(parents=True, exist_ok=True)
        self._earlier = _earlier(self.path)
        from sparing.evaluate.environment import environment

        self._environment = environment()
        self._started = datetime.now(UTC)
        self._clock = time.monotonic()
        self.write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the last record. The command's own error goes on, whatever becomes of the record."""
        if error is None:
            self.status = "finished"
            self.write()
            return
        stopped = isinstance(error, KeyboardInterrupt)
        self.status = "interrupted" if stopped else "failed"
        try:
            self.write()
        except OSError as reason:
            error.add_note(f"{self.path} could not be written: {reason}")
        if stopped:
            raise Interrupted(self.path.parent) from error

    def write(self) -> None:
        """Write the record as it stands now, so that figures survive a kill."""
        write_json(
            self.path,
            {
                "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
                "status": self.status,
                "started": self._started.isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - self._clock, 3),
                "seed": self.seed,
                "config": self.config,
                "figures": self.figures,
                **self._environment,
                "earlier": self._earlier,
            },
        )


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that `path` holds either all of it or what it held before.

    Tensors and arrays become lists, paths and types strings, and numbers that JSON lacks "nan" and "inf".
    """
    text = json.dumps(_plain(value), indent=2, allow_nan=False) + "\n"
    # Not `tempfile`: its files can be read by their owner only, and the rename would keep that.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            # Without it a power cut may keep the rename and lose the text.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _earlier(path: Path) -> list[dict[str, Any]]:
    """The runs that worked in this folder before, oldest first."""
    if not path.exists():
        return []
    try:
        last = json.loads(path.read_text(encoding="utf-8"))
        kept = ("command", "status", "started", "seconds", "seed", "config", "git")
        return [*last["earlier"], {key: last[key] for key in kept}]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a record of sparing's: move it away, or choose another --out") from error


def _plain(value: Any) -> Any:
    """`value` in the types that JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (str, int, float)):
        return value
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)
