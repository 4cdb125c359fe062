"""One cell at a time: load, prepare, train, measure. What cells share is kept for the next one."""

from __future__ import annotations

import dataclasses
import random
import shutil
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparing import zoo
from sparing.anatomy.shrinking import load_shrunk
from sparing.checkpoint import load, release, save
from sparing.evaluate.task import NotApplicable, Progress, Subject
from sparing.execute import run_of
from sparing.study.cells import Cell
from sparing.study.methods.method import Prepared
from sparing.study.shrinking import stand_in
from sparing.study.store import Result


class Bench:
    """Runs cells. Consecutive cells of one subject share it, and consecutive subjects of one model the model.

    Args:
        folder: where trained subjects are kept.
        device: where models are put.
        environment: kept with every result.
        cores: threads of a cell.
    """

    def __init__(
        self, folder: Path, *, device: torch.device | str = "cpu", environment: Mapping[str, Any], cores: int = 1
    ) -> None:
        self._folder, self._device, self._cores = folder, torch.device(device), cores
        # The threads of a cell, whoever runs it.
        machine = {**environment["hardware"], "threads": cores} if "hardware" in environment else None
        self._environment = {**environment, **({"hardware": machine} if machine else {})}
        self._loaded: tuple[Any, Subject] | None = None
        self._prepared: tuple[str, Prepared] | None = None

    def run(self, cell: Cell, on_step: Progress | None = None) -> Result:
        """Run a cell. Whatever goes wrong in it is in the result; only an interruption goes on."""
        threads = torch.get_num_threads()
        torch.set_num_threads(self._cores)
        start = time.perf_counter()
        prepared_after = start
        told: dict[str, Any] = {"environment": self._environment}
        try:
            prepared = self._subject(cell, on_step)
            prepared_after = time.perf_counter()
            told["details"] = {"method": dict(prepared.details)}
            seed_everything(cell.random_seed)
            outcome = cell.task.does.measure(prepared.subject, seed=cell.random_seed, on_step=on_step)
            return Result(
                "done",
                outcome,
                seconds=time.perf_counter() - prepared_after,
                prepared=prepared_after - start,
                **told,
            )
        except Exception as error:
            # A model that failed half-way may be left in any state.
            self._loaded = self._prepared = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return Result(
                "not applicable" if isinstance(error, NotApplicable) else "failed",
                error=_worded(error),
                traceback=traceback.format_exc(),
                seconds=time.perf_counter() - prepared_after,
                prepared=prepared_after - start,
                **told,
            )
        finally:
            torch.set_num_threads(threads)

    def subject(self, cell: Cell) -> Subject:
        """The subject of a cell, for an estimate."""
        return self._subject(cell, None).subject

    def stock(self, cell: Cell) -> Subject:
        """The cell's model before any method."""
        return self._load(cell)

    def _subject(self, cell: Cell, on_step: Progress | None) -> Prepared:
        if self._prepared is not None and self._prepared[0] == cell.subject:
            return self._prepared[1]
        self._prepared = None
        trained = self._folder / "trained" / cell.subject
        if cell.training is not None and (trained / "config.json").exists():
            return self._keep(cell, Prepared(self._read(str(trained), cell), {"trained": str(trained)}))
        stock = self._load(cell)
        if cell.method.does.changes_model or cell.training is not None:
            # Nobody else may go on with it.
            self._loaded = None
        seed_everything(cell.random_seed)
        prepared = cell.method.does.prepare(stock, seed=cell.random_seed, on_step=on_step)
        if cell.training is not None:
            work = self._folder / "training" / cell.subject
            work.mkdir(parents=True, exist_ok=True)
            seed_everything(cell.random_seed)
            subject = cell.training.does.train(prepared.subject, seed=cell.random_seed, folder=work, on_step=on_step)
            trained.parent.mkdir(exist_ok=True)
            save(subject.model, trained, policies=list(subject.policies), processor=subject.processor)
            shutil.rmtree(work, ignore_errors=True)
            prepared = Prepared(dataclasses.replace(prepared.subject, **_fields(subject)), prepared.details)
        return self._keep(cell, prepared)

    def _keep(self, cell: Cell, prepared: Prepared) -> Prepared:
        self._prepared = cell.subject, prepared
        return prepared

    def _load(self, cell: Cell) -> Subject:
        key = (cell.checkpoint, cell.shrink)
        if self._loaded is None or self._loaded[0] != key:
            # Let go of the last model before the next one is read.
            self._loaded = self._prepared = None
            self._loaded = key, self._read(cell.checkpoint.path, cell)
        return self._loaded[1]

    def _read(self, path: str, cell: Cell) -> Subject:
        if cell.shrink:
            model, processor = load_shrunk(
                stand_in(path, resolved, cell.checkpoint.like), attention=cell.checkpoint.attention
            )
            return Subject(model.to(self._device), processor)
        wanted = cell.checkpoint
        model, processor = load(resolved(path), dtype=wanted.dtype, device=self._device, attention=wanted.attention)
        run = run_of(model)
        if run is None:
            return Subject(model, processor)
        policies = run.policy.parts()
        release(model)
        return Subject(model, processor, policies)


def resolved(path: str) -> str:
    """A zoo model's name as its folder; everything else as it is."""
    return str(zoo.path(path)) if path in zoo.names() and not Path(path).exists() else path


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002 - libraries that tasks call draw from it
    torch.manual_seed(seed)


def _fields(subject: Subject) -> dict[str, Any]:
    return {field.name: getattr(subject, field.name) for field in dataclasses.fields(subject)}


def _worded(error: Exception) -> str:
    message = " ".join(str(error).split()) or type(error).__name__
    return message if isinstance(error, ValueError) else f"{type(error).__name__}: {message}"
