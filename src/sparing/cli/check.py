"""`sparing check`: what of sparing is safe to use on a model, measured on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparing.cli.options import Device, Dtype, Out, RemoteCode, Seed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from sparing.evaluate.checkup import Checkup
    from sparing.plan import Policy

MARKS = {"ok": ("✓", "green"), "slow": ("!", "yellow"), "fails": ("✗", "bold red"), "not applicable": ("–", "dim")}


def check(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, a hub id, or a zoo model.", metavar="MODEL")],
    policies: Annotated[
        list[str] | None,
        typer.Option("--policies", help="Only these: names, with commas between them or the option repeated."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One setting a policy, less decoding, short timing.")] = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = None,
    out: Out = Path("runs/check"),
) -> None:
    """Measure what of sparing is safe to use on a model: same results, padding, generation, saving, speed, memory.

    A model that was saved with policies is checked with those, or with --policies in their place. Writes run.json
    and check.html to --out. Exit code 0: all safe (slower is safe); 1: something fails; 2: bad input.
    """
    import json

    from rich.console import Console

    from sparing.cli.models import load_model
    from sparing.cli.profile import check_out
    from sparing.cli.record import RunRecord
    from sparing.evaluate.checkup import NAMES
    from sparing.study.pages.check_page import write_check

    check_out(out)
    names = [name for given in policies or () for name in given.replace(",", " ").split()]
    if unknown := [name for name in names if name not in NAMES]:
        raise ValueError(f"--policies {unknown[0]}: there is no such policy; choose of {', '.join(NAMES)}")
    loaded, processor, saved = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    console = Console()
    # What is checked, of what was asked for and what the checkpoint follows.
    saved = () if names else saved
    config = {"model": model, "policies": names or [repr(policy) for policy in saved], "quick": quick}
    config |= {"device": device, "dtype": dtype}
    with RunRecord(out, config=config, seed=seed) as record:
        found = _run(loaded, processor, names, saved, quick, seed, console)
        record.figures = found.as_dict()
        record.write()
        run = json.loads(record.path.read_text(encoding="utf-8"))
        write_check(record.figures, {**run, "status": "finished"}, out / "check.html")
    _print(found, console, fresh=not saved)
    console.print(f"report: {out / 'check.html'}", style="bold", soft_wrap=True, highlight=False)
    if not found.safe:
        raise typer.Exit(1)


def _run(
    model: Any,
    processor: Any,
    names: list[str],
    saved: Sequence[Policy],
    quick: bool,
    seed: int,
    console: Console,
) -> Checkup:
    """The check-up, with a bar; of the policies that the model was saved with, if there are any."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from sparing.evaluate.checkup import Subject, checkup
    from sparing.plan import Composed

    follows = "import sparing\n\nmodel, processor = sparing.load({!r})  # follows its policies\nout = model.generate(**inputs)"
    code = follows.format(getattr(model, "name_or_path", ""))
    subjects = [Subject("as saved", [lambda: Composed(*saved)], code=code)] if saved else None
    columns = (
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", style="dim"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)

        def on_step(done: int, total: int, line: str) -> None:
            progress.update(task, completed=done, total=total, description=line)

        return checkup(model, processor, policies=names, subjects=subjects, quick=quick, seed=seed, on_step=on_step)


def _print(found: Checkup, console: Console, *, fresh: bool) -> None:
    """One line a check, what to do where one fails, and the answer."""
    from rich.text import Text

    width = max(len(f.name) for f in found.findings)
    subject = ""
    for finding in found.findings:
        if finding.subject != subject:
            subject = finding.subject
            console.print(Text(subject, style="bold"))
        mark, style = MARKS[finding.verdict]
        line = Text.assemble(
            (f"  {mark} ", style), f"{finding.name:<{width}}  ", (finding.sentence, "" if finding.cure else "dim")
        )
        console.print(line, soft_wrap=True)
        if finding.verdict == "fails":
            console.print(Text(f"{'':<{width + 6}}{finding.cure}", style="yellow"), soft_wrap=True)
    console.print()
    for line in found.words():
        console.print(Text(line, style="bold"))
    why = ": fresh routers decide at random, so they show the mechanics alone" if fresh else ""
    console.print(Text(f"Answers are not judged{why}.", style="dim"), soft_wrap=True)
