"""Progress bars of the long commands: what is done, how far it is, for how long, and the latest step beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def step_bars(console: Console, *, width: int = 0, transient: bool = False) -> Progress:
    """Bars whose tasks have a field `line`, as a context.

    Args:
        console: where; a quiet one shows nothing.
        width: of the descriptions, at least.
        transient: leave nothing behind.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn(f"{{task.description:<{width}}}" if width else "{task.description}"),
        BarColumn(24),
        TimeElapsedColumn(),
        TextColumn("{task.fields[line]}", style="dim"),
    )
    return Progress(*columns, console=console, disable=console.quiet, transient=transient)


@contextlib.contextmanager
def step_bar(what: str, console: Console) -> Iterator[Callable[[float, str], None]]:
    """One bar; yields what is told the share that is done and a line."""
    with step_bars(console, width=10) as progress:
        task = progress.add_task(what, total=1.0, line="")
        yield lambda done, line: progress.update(task, completed=done, line=line)
