"""A study's cells: one model, method, training, task and seed each, known by the content that their result depends on."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparing.study.spec import ModelEntry, StudySpec, Variant

# Of larger files the size, the beginning and the end are hashed: a 14 GB checkpoint would take minutes.
WHOLE = 1 << 26
ENDS = 1 << 22


@dataclasses.dataclass(frozen=True)
class Cell:
    """One thing to measure.

    Attributes:
        key: a hash of everything that the result depends on; names and places of files are no part of it.
        subject: the same without the task: cells that share it measure the same subject.
        model: the model's name in the study.
        checkpoint: the model.
        method: what is done to it.
        training: how it is trained afterwards; `None` if it is not.
        task: what is measured.
        seed: of whatever is random; `None` where nothing is.
        shrink: two layers of random weights instead of the model.
    """

    key: str
    subject: str
    model: str
    checkpoint: ModelEntry
    method: Variant
    training: Variant | None
    task: Variant
    seed: int | None
    shrink: bool

    @property
    def label(self) -> str:
        """What it is, in a line."""
        parts = [self.model, self.method.label]
        parts += [self.training.label] if self.training else []
        parts += [self.task.label]
        parts += [f"seed {self.seed}"] if self.seed is not None else []
        return " · ".join(parts)

    @property
    def random_seed(self) -> int:
        """The seed to use."""
        return self.seed or 0


def cells_of(spec: StudySpec, *, shrink: bool = False, hardware: str = "") -> tuple[Cell, ...]:
    """Every cell of a study, those of one subject together.

    Args:
        spec: the study.
        shrink: two layers of random weights instead of the models.
        hardware: what seconds depend on; part of the key of timed tasks.

    Raises:
        ValueError: two cells are alike.
    """
    found: dict[str, Cell] = {}
    for model, method, training, tasks in spec.combinations():
        entry = spec.models[model]
        seeded = method.does.seeded or (training is not None and training.does.seeded) or entry.seeded
        fixed: dict[str, Any] = {
            "method": _content(method),
            "training": None if training is None else _content(training),
            # Made small, and with one page in place of texts that are not here, what differs may become alike.
            "names": [method.name, training and training.name] if shrink else None,
        }
        pairs = [(seed, task) for seed in spec.file.seeds for task in tasks if seeded or task.does.seeded]
        for seed, task in [*((None, task) for task in tasks if not (seeded or task.does.seeded)), *pairs]:
            checkpoint = entry if seed is None else entry.of(seed)
            content = {
                **fixed,
                "model": [_fingerprint(checkpoint.path), checkpoint.dtype, checkpoint.attention, shrink],
            }
            subject = _hash({**content, "seed": seed if seeded else None})
            timed = [hardware, spec.file.cores, spec.file.gpus] if task.does.timed else None
            cell = Cell(
                key=_hash(
                    {
                        **content,
                        "seed": seed,
                        "task": _content(task),
                        "timed": timed,
                        "name": task.name if shrink else None,
                    }
                ),
                subject=subject,
                model=model,
                checkpoint=checkpoint,
                method=method,
                training=training,
                task=task,
                seed=seed,
                shrink=shrink,
            )
            if (twin := found.get(cell.key)) is not None:
                raise ValueError(
                    f"{spec.path}, line {_differing_line(twin, cell)}: two cells are alike, {twin.label!r} and {cell.label!r}: "
                    "leave one of them out"
                )
            found[cell.key] = cell
    if not found:
        raise ValueError(
            f"{spec.path}: the study has no cells: `models`, `tasks` or `training` of its methods exclude all"
        )
    return tuple(found.values())


def _differing_line(one: Cell, two: Cell) -> int:
    pairs = [(one.method, two.method), (one.training, two.training), (one.task, two.task)]
    return next((b.line for a, b in pairs if b is not None and a is not b), two.method.line)


def _content(variant: Variant) -> dict[str, Any]:
    """A variant as it enters a key: files by their content, wherever they lie."""
    fields = {field.name: _plain(getattr(variant.does, field.name)) for field in dataclasses.fields(variant.does)}
    return {"use": variant.use, "with": fields, "files": [_digest(file) for file in variant.does.files()]}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return "file" if value.is_absolute() else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return sorted(value) if isinstance(value, (set, frozenset)) else value


def _fingerprint(path: str) -> Any:
    """A checkpoint by its content where it lies on this machine, else by its id."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    wanted = {".json", ".safetensors", ".jinja", ".model", ".txt"}
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix in wanted)
    return {str(file.relative_to(folder)): _digest(file) for file in files}


def _digest(file: Path) -> str:
    stat = file.stat()
    return _digest_of(file, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _digest_of(file: Path, size: int, changed: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        if size <= WHOLE:
            while block := opened.read(1 << 20):
                digest.update(block)
        else:
            digest.update(opened.read(ENDS))
            opened.seek(-ENDS, 2)
            digest.update(opened.read(ENDS))
    return digest.hexdigest()[:16]


def _hash(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
