"""`sparing study report`, `diff` and `export`: what reads a study's results, and runs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from sparing.study.comparison import Comparison
    from sparing.study.results import Results

Folder = Annotated[Path, typer.Argument(help="The folder of a study's results.", metavar="DIR", file_okay=False)]
STYLES = {"worse": "red", "better": "green", "other": "cyan", "unsure": "dim", "same": "dim"}
WORDS = {"worse": "worse", "better": "better", "other": "differs", "unsure": "not told apart", "same": "same"}
# Rows of the table on the terminal; --json has all of them.
SHOWN = 40


def report(
    folder: Folder,
    out: Annotated[
        Path | None, typer.Option("--out", help="The page; DIR/report.html by default.", dir_okay=False)
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write the report of a study: one HTML file with its tables, charts and cells, also while the study runs.

    Every arm is compared with the baseline, and with its matched control if it has one (`control_of` in the YAML), on the same
    items and seeds. The page asks for nothing and may be sent around.
    """
    import webbrowser

    from rich.console import Console

    from sparing.study.pages import write_study_report
    from sparing.study.results import read_results

    path = folder / "report.html" if out is None else out
    results = read_results(folder)
    if not results.cells:
        raise ValueError(f"{folder} has no results yet: run the study first")
    if not path.parent.is_dir():
        raise ValueError(f"--out {path}: the folder {path.parent} does not exist; make it, or name another")
    write_study_report(results, path)
    console = Console()
    if results.shrunk:
        console.print("shrunk: random weights, little data; these figures mean nothing", style="yellow")
    print_sentences(results, console)
    console.print(f"report: {path}", style="bold", soft_wrap=True, highlight=False)
    if show and not webbrowser.open(path.absolute().as_uri()):
        raise ValueError(f"--open: no browser was found; open {path} yourself")


def diff(
    first: Annotated[Path, typer.Argument(help="The folder to compare with.", metavar="DIR", file_okay=False)],
    second: Annotated[Path, typer.Argument(help="The other folder.", metavar="DIR", file_okay=False)],
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything to this file too.", dir_okay=False)
    ] = None,
    fail_on_change: Annotated[
        bool,
        typer.Option("--fail-on-change", help="Exit with 1 if a figure got significantly worse, or a cell now fails."),
    ] = False,
) -> None:
    """Compare two results folders: cells in one only, and every figure that changed, with intervals.

    Cells are matched by content, and by name where the content (data, settings, weights) changed. Differences are paired over
    the items that both have; without items, two figures count as told apart where their 95% intervals do not overlap. What an
    arm came out as against the baseline or its matched control is told where the two runs conclude differently.
    """
    import json

    from rich.console import Console

    from sparing.study.comparison import compare_results
    from sparing.study.pages import write_page
    from sparing.study.results import read_results

    if json_file is not None and not json_file.parent.is_dir():
        raise ValueError(f"--json {json_file}: the folder {json_file.parent} does not exist; make it, or name another")
    found = compare_results(read_results(first), read_results(second))
    if json_file is not None:
        content = {"first": str(first), "second": str(second), **found.as_dict()}
        write_page(json.dumps(content, indent=2, allow_nan=False) + "\n", json_file)
    _print(found, Console())
    if fail_on_change and found.worse:
        raise typer.Exit(1)


def export(
    folder: Folder,
    format: Annotated[Literal["csv", "parquet"], typer.Option("--format", help="Of the files.")] = "csv",
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the files; DIR/export by default.", file_okay=False)
    ] = None,
    items: Annotated[
        bool, typer.Option("--items", help="Write the scores of single items too, as a file of its own.")
    ] = False,
) -> None:
    """Write a study's figures as CSV or Parquet: one row a cell and figure, every setting in a column of its own."""
    from rich.console import Console

    from sparing.study.export import export as write
    from sparing.study.results import read_results

    out = folder / "export" if out is None else out
    for path in write(read_results(folder, items=items), out, format=format, items=items):
        Console().print(str(path), soft_wrap=True, highlight=False, markup=False)


def print_sentences(results: Results, console: Console) -> None:
    """A line for every question: how the comparisons came out."""
    from rich.text import Text

    from sparing.study.conclusions import sentences_of

    for ask, said in sentences_of(results):
        console.print(Text.assemble((ask, "bold"), f" {said}"), soft_wrap=True)


def _print(found: Comparison, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    from sparing.study.pages import numbers

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style=style), soft_wrap=True)

    if found.shrunk:
        say("shrunk: random weights, little data; these figures mean nothing", "yellow")
    for name, (one, two) in found.environments.items():
        say(f"{name}: {one} → {two}", "dim")
    for what, labels in (
        ("only in the first", found.only_first),
        ("only in the second", found.only_second),
        ("same name, other content", found.changed_content),
    ):
        if labels:
            say(f"{what}: {len(labels)} cell{'s' * (len(labels) != 1)}", "bold")
            for label in labels[:8]:
                say(f"  {label}")
            if len(labels) > 8:
                say(f"  and {len(labels) - 8} more", "dim")
    for change in found.statuses:
        style = "red" if change.second == "failed" else ""
        say(f"{change.label}: {change.first} → {change.second} ({change.error})", style)
    for each in found.conclusions:
        words = f"{WORDS[each.first]} → {WORDS[each.second]}"
        say(f"{each.where} · {each.arm}: {each.figure} against {each.other}: {words}", STYLES[each.second])
    shown = [change for change in found.changes if change.verdict != "same"]
    if shown:
        table = Table("cell", "figure", "first", "second", "difference", "", box=None, pad_edge=False)
        for change in shown[:SHOWN]:
            unit, name, style = change.unit, change.figure, STYLES[change.verdict]
            values: list[Any] = [numbers.number(value, unit, name) for value in (change.first, change.second)]
            said = numbers.difference(change.difference, unit, name)
            row = [change.label, name, *values, said, WORDS[change.verdict]]
            table.add_row(*(Text(str(text), style=style if i > 3 else "") for i, text in enumerate(row)))
        console.print(table)
        if len(shown) > SHOWN:
            say(f"and {len(shown) - SHOWN} more that differ: --json has all of them", "dim")
    counts = {word: sum(change.verdict == verdict for change in found.changes) for verdict, word in WORDS.items()}
    told = ", ".join(f"{n} {word}" for word, n in counts.items() if n) or "none in common"
    say(f"figures: {told}", "bold")
