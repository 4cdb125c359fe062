"""`Study`: a YAML's grid, run cell by cell into one SQLite file, going on wherever it stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import statistics
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from filelock import FileLock, Timeout

from sparing.evaluate.environment import environment as surroundings
from sparing.evaluate.task import Progress
from sparing.study.bench import Bench
from sparing.study.cells import Cell, cells_of
from sparing.study.spec import StudySpec, read_study
from sparing.study.store import Result, Status, Store, Stored

RESULTS = "results.sqlite"
COPY = "study.yaml"
# Rows and tokens of the pass that measures a model's speed for the estimate.
PROBE = (4, 256)
Where = Literal["local", "ray"]


class Watcher(Protocol):
    """Is told what goes on."""

    def started(self, cell: Cell) -> None:
        """A cell begins."""

    def step(self, cell: Cell, done: float, line: str) -> None:
        """A cell goes on: the share that is done, and a word on it."""

    def finished(self, cell: Cell, result: Result) -> None:
        """A cell is done, and its result is in the file."""


class Silent:
    """A watcher that says nothing."""

    def started(self, cell: Cell) -> None:
        """Nothing."""

    def step(self, cell: Cell, done: float, line: str) -> None:
        """Nothing."""

    def finished(self, cell: Cell, result: Result) -> None:
        """Nothing."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """How long a run will take.

    Attributes:
        seconds: of the cells that could be told.
        measured: cells told from finished cells of the same model and task.
        guessed: cells told from the model's speed and the task's tokens; what methods do beforehand is not in it.
        unknown: cells that could not be told.
    """

    seconds: float
    measured: int
    guessed: int
    unknown: int


class Study:
    """A study in a folder.

    Args:
        source: the YAML, or the folder of an earlier run.
        out: the folder of the results; that of the earlier run by default.
        shrink: two layers of random weights instead of the models, and little data.
        paths: other folders for some of the names under `paths:` in the YAML.
        device: where models are put.
        environment: versions, git state and hardware, kept with every result; found out by default.

    Raises:
        ValueError: anything wrong with the YAML, or a folder that holds another study.
    """

    def __init__(
        self,
        source: str | Path,
        out: str | Path | None = None,
        *,
        shrink: bool = False,
        paths: Mapping[str, str | Path] | None = None,
        device: str | torch.device = "cpu",
        environment: Mapping[str, Any] | None = None,
    ) -> None:
        source = Path(source)
        about: dict[str, Any] = {}
        if source.is_dir():
            out = source if out is None else out
            with Store(source / RESULTS) as store:
                about = store.about()
            # The YAML may have moved or changed; what was run is kept beside the results.
            source, shrink = Path(about["source"]), bool(about["shrink"])
            paths = {**about["paths"], **(paths or {})}
            if not source.is_file():
                raise ValueError(f"{source}, from which {out} was run, is gone: name the YAML, with --out {out}")
        if out is None and not source.exists():
            raise ValueError(f"{source} does not exist: run the study first, or name its folder")
        if out is None:
            raise ValueError(f"{source} is a file: name the folder of the results too")
        self.out, self.shrink, self.paths, self.device = Path(out), shrink, dict(paths or {}), torch.device(device)
        self.spec: StudySpec = read_study(source, paths=self.paths, shrink=shrink)
        self.environment = dict(surroundings() if environment is None else environment)
        # How many threads this process has decides nothing: a cell takes those that the YAML says.
        machine = {k: v for k, v in self.environment.get("hardware", {}).items() if k != "threads"}
        self.cells = cells_of(self.spec, shrink=shrink, hardware=str(machine or ""))
        self._by_key = {cell.key: cell for cell in self.cells}

    # Running -------------------------------------------------------------------------------------------------------

    def run(
        self,
        *,
        on: Where = "local",
        again: bool = False,
        only: Sequence[str] | None = None,
        watcher: Watcher | None = None,
        address: str | None = None,
    ) -> dict[str, Status]:
        """Run every cell that has no result yet.

        Args:
            on: `local`, one cell after the other in this process; `ray`, on a Ray cluster.
            again: run failed cells again too.
            only: keys of the cells to run.
            watcher: is told what goes on.
            address: of the Ray cluster; a cluster on this machine by default.

        Returns:
            key -> what became of the cell, for all cells of the study that were ever run.

        Raises:
            ValueError: another process runs this study, or a result cannot be kept: the file is locked, the disk is full. The
                results before it are whole.
            KeyboardInterrupt: after Ctrl-C; what was finished is kept.
        """
        watcher = watcher or Silent()
        with self._alone(), Store(self.out / RESULTS, create=True) as store:
            self._claim(store)
            pending = self.pending(store, again=again, only=only)
            # Closed at once where a result cannot be kept: workers must not go on for nobody.
            with contextlib.closing(self._results(on, pending, watcher, address)) as results:
                for cell, result in results:
                    store.put(cell, result)
                    watcher.finished(cell, result)
            return {cell.key: status for cell in self.cells if (status := store.statuses().get(cell.key))}

    def pending(
        self, store: Store | None = None, *, again: bool = False, only: Sequence[str] | None = None
    ) -> list[Cell]:
        """The cells that have no result yet, in the study's order."""
        if store is None:
            if not (self.out / RESULTS).exists():
                statuses: dict[str, Status] = {}
            else:
                with Store(self.out / RESULTS) as opened:
                    statuses = opened.statuses()
        else:
            statuses = store.statuses()
        settled = {"done", "not applicable"} if again else {"done", "not applicable", "failed"}
        return [
            cell for cell in self.cells if statuses.get(cell.key) not in settled and (only is None or cell.key in only)
        ]

    def results(self) -> list[Stored]:
        """The cells that have a result, in the study's order."""
        with Store(self.out / RESULTS) as store:
            return store.cells([cell.key for cell in self.cells])

    def estimate(self, pending: Iterable[Cell]) -> Estimate:
        """Guess how long cells will take: from finished ones of the same model and task, else from the model's speed."""
        history: dict[tuple[str, str], list[float]] = {}
        if (self.out / RESULTS).exists():
            with Store(self.out / RESULTS) as store:
                history = store.seconds()
        bench, rates = self._bench(), dict[str, float | None]()
        threads = torch.get_num_threads()
        torch.set_num_threads(self.spec.file.cores)
        seconds, measured, guessed, unknown = 0.0, 0, 0, 0
        for cell in pending:
            if times := history.get((cell.model, cell.task.label)):
                seconds, measured = seconds + statistics.median(times), measured + 1
                continue
            try:
                subject = bench.stock(cell)
                if cell.model not in rates:
                    rates[cell.model] = tokens_per_second(subject.model)
                work, rate = cell.task.does.work(subject), rates[cell.model]
            except ValueError:
                work = rate = None
            if work is None or not rate:
                unknown += 1
            else:
                seconds, guessed = seconds + work / rate, guessed + 1
        torch.set_num_threads(threads)
        return Estimate(seconds, measured, guessed, unknown)

    def _results(
        self, on: Where, pending: Sequence[Cell], watcher: Watcher, address: str | None
    ) -> Generator[tuple[Cell, Result]]:
        if on == "ray":
            from sparing.study.on_ray import run_on_ray

            yield from run_on_ray(self, pending, watcher, address)
            return
        bench = self._bench()
        for cell in pending:
            watcher.started(cell)
            yield cell, bench.run(cell, _steps_of(watcher, cell))

    def _bench(self) -> Bench:
        return Bench(self.out, device=self.device, environment=self.environment, cores=self.spec.file.cores)

    # The folder ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Only one process runs a study in a folder at a time; the lock dies with its process."""
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out {self.out} is a file: name a folder")
        self.out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.out / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(f"another process is running the study in {self.out}: wait for it, or stop it") from error
        try:
            yield
        finally:
            lock.release()

    def _claim(self, store: Store) -> None:
        about = store.about()
        name = self.spec.file.study
        if about and about["study"] != name:
            raise ValueError(f"{self.out} holds the study {about['study']!r}, not {name!r}: choose another --out")
        if about and bool(about["shrink"]) != self.shrink:
            was, cure = ("shrunk", "add --shrink") if about["shrink"] else ("in full", "leave --shrink out")
            raise ValueError(f"{self.out} holds this study {was}: {cure}, or choose another --out")
        places = {id(variant): i for i, variant in enumerate(self.spec.methods)}
        store.describe(
            study=name,
            about=self.spec.file.about,
            source=str(self.spec.path.absolute()),
            paths={key: str(value) for key, value in self.paths.items()},
            shrink=self.shrink,
            baseline=self.spec.baseline,
            controls=[name for name, entry in self.spec.file.methods.items() if entry.control or entry.control_of],
            matched=self.spec.controls,
            variants={cell.key: places[id(cell.method)] for cell in self.cells},
            questions=[question.model_dump() for question in self.spec.file.questions],
            cells=[cell.key for cell in self.cells],
            labels={cell.key: cell.label for cell in self.cells},
        )
        copy = self.out / f".{COPY}.tmp"
        shutil.copyfile(self.spec.path, copy)
        copy.replace(self.out / COPY)


def _steps_of(watcher: Watcher, cell: Cell) -> Progress:
    def on_step(done: float, line: str) -> None:
        watcher.step(cell, done, line)

    return on_step


@torch.inference_mode()
def tokens_per_second(model: Any) -> float:
    """How fast a model goes through a prompt, roughly: the quickest of three passes."""
    rows, length = PROBE[0], min(PROBE[1], model.config.get_text_config().max_position_embeddings)
    ids = torch.zeros((rows, length), dtype=torch.long, device=model.get_input_embeddings().weight.device)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        model(input_ids=ids, use_cache=False)
        seconds.append(time.perf_counter() - start)
    return rows * length / max(min(seconds), 1e-9)
