"""`sparing study`: one grid of models, methods, tasks and seeds, run into one file and read from there."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sparing.cli.options import Device, places_of
from sparing.cli.study_reading import diff, export, print_sentences, report

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from sparing.study import Cell, Result, Study
    from sparing.study.store import Status, Stored

study = typer.Typer(
    help="Compare methods on models and tasks under one protocol: a YAML file in, tables and figures out.",
    no_args_is_help=True,
)

Folder = Annotated[Path, typer.Argument(help="The folder of a study's results.", metavar="DIR", file_okay=False)]
Places = Annotated[
    list[str] | None,
    typer.Option("--path", help="NAME=FOLDER: another folder for a name under `paths:` in the YAML; may be repeated."),
]
On = Annotated[
    Literal["local", "ray"],
    typer.Option("--on", help="local: one cell after the other; ray: on a Ray cluster, many at a time."),
]
Address = Annotated[
    str | None, typer.Option("--address", help="Of the Ray cluster, such as auto; one on this machine by default.")
]
Again = Annotated[bool, typer.Option("--again", help="Run failed cells again too.")]
MARKS: dict[str, tuple[str, str]] = {
    "done": ("✓", "green"),
    "failed": ("✗", "bold red"),
    "not applicable": ("–", "dim"),
}


@study.command()
def run(
    file: Annotated[Path, typer.Argument(help="The study's YAML.", metavar="FILE")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the results; runs/NAME by default.", file_okay=False)
    ] = None,
    on: On = "local",
    path: Places = None,
    shrink: Annotated[
        bool,
        typer.Option(
            "--shrink", help="Two layers, random weights, little data: does it run? Its figures mean nothing."
        ),
    ] = False,
    again: Again = False,
    device: Device = "auto",
    address: Address = None,
) -> None:
    """Run every cell of a study that has no result yet, and write the report.

    Results go to results.sqlite in --out as they come: after Ctrl-C, a crash or a kill the same command goes on with the
    next cell. A cell that fails keeps its error and does not stop the others. Exit code 1: a cell failed.
    """
    from sparing.cli.options import device_of
    from sparing.evaluate.environment import environment
    from sparing.study import Study

    if out is None:
        from sparing.study.spec import read_study

        out = Path("runs") / read_study(file, paths=places_of(path), shrink=shrink).file.study.replace(" ", "-")
    job = Study(file, out, shrink=shrink, paths=places_of(path), device=device_of(device), environment=environment())
    _run(job, on=on, again=again, address=address)


@study.command()
def resume(
    folder: Folder, on: On = "local", again: Again = False, device: Device = "auto", address: Address = None
) -> None:
    """Go on with a study where it stopped, from its folder alone."""
    from sparing.cli.options import device_of
    from sparing.evaluate.environment import environment
    from sparing.study import Study

    _run(Study(folder, device=device_of(device), environment=environment()), on=on, again=again, address=address)


@study.command()
def status(folder: Folder) -> None:
    """Show how far a study is: cells by method and task, what failed and why, and the time that is left."""
    from rich.console import Console
    from rich.table import Table

    from sparing.evaluate.environment import environment
    from sparing.study import Study

    job = Study(folder, environment=environment())
    found = {stored.key: stored for stored in job.results()}
    console = Console()
    tasks = list(dict.fromkeys(cell.task.label for cell in job.cells))
    table = Table(
        "model", "method", *tasks, title=f"{job.spec.file.study}: {_progress(job, found)}", title_justify="left"
    )
    rows: dict[tuple[str, str], dict[str, list[str]]] = {}
    for cell in job.cells:
        label = " + ".join(variant.label for variant in (cell.method, cell.training) if variant)
        row = rows.setdefault((cell.model, label), {})
        state = found[cell.key].result.status if cell.key in found else "pending"
        row.setdefault(cell.task.label, []).append(state)
    for (model, label), row in rows.items():
        table.add_row(model, label, *(_marks(row.get(task, [])) for task in tasks))
    console.print(table)
    _print_failures(list(found.values()), console)
    pending = job.pending()
    if pending:
        console.print(f"left: {_left(job, pending)}; go on with: sparing study resume {folder}", soft_wrap=True)


for command in (report, diff, export):
    study.command()(command)


def _run(job: Study, *, on: Literal["local", "ray"], again: bool, address: str | None) -> None:
    from rich.console import Console
    from transformers.utils import logging

    from sparing.cli.profile import check_out
    from sparing.cli.record import RunRecord
    from sparing.study.pages import write_study_report
    from sparing.study.results import read_results

    logging.disable_progress_bar()
    check_out(job.out)
    console = Console()
    pending = job.pending(again=again)
    total = len(job.cells)
    console.print(f"{job.spec.file.study}: {_cells(total)}, {total - len(pending)} of them there", highlight=False)
    if job.shrink:
        console.print("shrunk: two layers of random weights, little data; these figures mean nothing", style="yellow")
    if pending:
        console.print(f"{len(pending)} to run: {_left(job, pending)}", highlight=False, soft_wrap=True)
    config = {"study": job.spec.path, "on": on, "shrink": job.shrink, "device": job.device, "paths": job.paths}
    with RunRecord(job.out, config=config) as record:
        # Watches and writes under Ctrl-C too: the record says what was finished.
        try:
            statuses = job.run(on=on, again=again, address=address, watcher=_Bars(console, total, len(pending)))
        finally:
            record.figures = {"cells": total, **_counts(job)}
        _print_failures(job.results(), console)
        results = read_results(job.out)
        write_study_report(results, job.out / "report.html")
        print_sentences(results, console)
    counts = Counter(statuses.values())
    said = ", ".join(f"{counts[s]} {s}" for s in ("done", "failed", "not applicable") if counts[s])
    console.print(
        f"{said or 'nothing to run'}: {job.out / 'report.html'}", style="bold", soft_wrap=True, highlight=False
    )
    if counts["failed"]:
        raise typer.Exit(1)


class _Bars:
    """Two bars: the cells, and the cell that runs now."""

    def __init__(self, console: Console, total: int, pending: int) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._progress: Progress = Progress(
            TextColumn("{task.description:<6}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[line]}", style="dim"),
            console=console,
        )
        self._console = console
        self._task: Any = None
        self._total, self._pending = total, pending
        self._running: dict[str, str] = {}

    def started(self, cell: Cell) -> None:
        """Show the cell."""
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task("cells", total=self._pending, line="")
        self._running[cell.key] = cell.label
        self._show()

    def step(self, cell: Cell, done: float, line: str) -> None:
        """Show how far it is."""
        self._running[cell.key] = f"{cell.label}: {line} ({done:.0%})"
        self._show()

    def finished(self, cell: Cell, result: Result) -> None:
        """Count it, and say if it failed."""
        self._running.pop(cell.key, None)
        if result.status != "done":
            mark, style = MARKS[result.status]
            self._progress.console.print(
                f"{mark} {cell.label}: {result.error}", style=style, markup=False, highlight=False
            )
        self._progress.advance(self._task)
        self._show()
        if self._progress.finished:
            self._progress.stop()

    def _show(self) -> None:
        running = list(self._running.values())
        more = f" and {len(running) - 1} more" if len(running) > 1 else ""
        self._progress.update(self._task, line=running[0] + more if running else "")


def _counts(job: Study) -> dict[str, int]:
    """How many cells came to which end; nothing where the file cannot be read, which the run's own error says better."""
    try:
        return dict(Counter(stored.result.status for stored in job.results()))
    except ValueError:
        return {}


def _progress(job: Study, found: dict[str, Stored]) -> str:
    counts = Counter(stored.result.status for stored in found.values())
    told = ", ".join(f"{counts[s]} {s}" for s in ("done", "failed", "not applicable") if counts[s])
    return f"{_cells(len(job.cells))}, {told or 'none run'}, {len(job.cells) - len(found)} to run"


def _cells(n: int) -> str:
    return f"{n} cell{'s' * (n != 1)}"


def _marks(states: list[Status | Literal["pending"]] | list[str]) -> str:
    """Marks of a row's cells of one task, one a seed."""
    shown = []
    for state in states:
        mark, style = MARKS.get(state, ("·", "dim"))
        shown.append(f"[{style}]{mark}[/]")
    return "".join(shown)


def _left(job: Study, pending: list[Cell]) -> str:
    from datetime import timedelta

    found = job.estimate(pending)
    if not found.measured + found.guessed:
        return "how long it takes is not known yet"
    said = f"about {timedelta(seconds=round(found.seconds))}"
    unsure = [f"{_cells(found.guessed)} guessed from the model's speed"] if found.guessed else []
    unsure += [f"{found.unknown} unknown"] if found.unknown else []
    return said + (f" ({', '.join(unsure)})" if unsure else "")


def _print_failures(found: list[Stored], console: Console) -> None:
    for state in ("failed", "not applicable"):
        for stored in found:
            if stored.result.status == state:
                mark, style = MARKS[state]
                line = f"{mark} {stored.label}: {stored.result.error}"
                console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
