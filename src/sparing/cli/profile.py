"""`sparing profile`: what a model needs on a text, and the best plan within a budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sparing.cli.options import Device, Dtype, DtypeName, Out, RemoteCode, Seed

if TYPE_CHECKING:
    from rich.console import Console

    from sparing.evaluate import Profiler, Settings


def profile(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, or a hub id.", metavar="MODEL")],
    text: Annotated[Path, typer.Option("--text", help="UTF-8 text to measure on, .txt or .gz.")],
    budget: Annotated[float, typer.Option("--budget", help="Share of the prefill's operations to stay within.")] = 0.6,
    search: Annotated[
        Literal["greedy", "additive"],
        typer.Option("--search", help="greedy runs the best candidates of every step; additive is quicker."),
    ] = "greedy",
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Tokens of the text to use: half to choose on, half to report.")
    ] = 8192,
    window: Annotated[int, typer.Option("--window", min=8, help="Most tokens of a window.")] = 256,
    quick: Annotated[bool, typer.Option("--quick", help="Less text, additive search, short timing.")] = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = None,
    without_policies: Annotated[
        bool,
        typer.Option("--without-policies", help="Of a model that was saved with policies, profile the weights alone."),
    ] = False,
    out: Out = Path("runs/profile"),
) -> None:
    """Measure what each module and each kind of token is worth on a text; find the best plan within a budget.

    Writes run.json, report.html and measurements.jsonl to --out. A second run goes on where the first one stopped.
    """
    from sparing.evaluate import Settings, read_text

    settings = Settings(budget=budget, method=search, max_tokens=max_tokens, window=window, seed=seed)
    settings = settings.quick() if quick else settings
    config = {"model": model, "text": text, "quick": quick, "device": device, "dtype": dtype}
    check_out(out)
    run_profile(
        model,
        read_text(text),
        str(text),
        settings,
        out,
        config=config,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        without_policies=without_policies,
    )


def check_out(out: Path) -> None:
    """Refuse a folder that cannot be made, before anything slow begins.

    Raises:
        ValueError: the folder, or what it would lie in, is a file or may not be written to.
    """
    import os

    place = out
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"--out {out}: {place} is a file; name a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"--out {out}: {place} may not be written to; name another folder")


def run_profile(
    model: str,
    text: str,
    source: str,
    settings: Settings,
    out: Path,
    *,
    config: dict[str, Any],
    device: str,
    dtype: DtypeName,
    trust_remote_code: bool | None = None,
    without_policies: bool = False,
) -> None:
    """Profile a model and leave `run.json` and `report.html` in `out`; bad input leaves the folder as it was.

    Args:
        model: a checkpoint's folder, or a hub id.
        text: the text itself.
        source: where it came from, for the report.
        settings: how to go about it.
        out: the folder of the results.
        config: the command's options, for the record.
        device: as `--device`.
        dtype: as `--dtype`.
        trust_remote_code: as `--trust-remote-code`.
        without_policies: as `--without-policies`.

    Raises:
        ValueError: the model follows policies, and would be profiled as another one.
    """
    import dataclasses
    import json

    from rich.console import Console

    from sparing.cli.models import load_model
    from sparing.cli.profile_summary import print_summary
    from sparing.cli.record import RunRecord
    from sparing.evaluate import Profiler
    from sparing.study import write_report

    loaded, tokenizer, saved = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if saved and not without_policies:
        names = " & ".join(type(policy).__name__ for policy in saved)
        raise ValueError(
            f"{model} follows {names}, and a profile looks for a plan on top of none: --without-policies profiles its weights "
            "alone (in Python sparing.release(model) takes them off); `sparing check` measures it with them"
        )
    job = Profiler(loaded, tokenizer, text, settings)
    console = Console()
    with RunRecord(out, config={**config, **dataclasses.asdict(settings)}, seed=settings.seed) as record:
        figures = _measure(job, out / "measurements.jsonl", console)
        figures["text"]["file"] = source
        record.figures = figures
        record.write()
        run = json.loads(record.path.read_text(encoding="utf-8"))
        write_report(figures, {**run, "status": "finished"}, out / "report.html")
    print_summary(figures, console)
    console.print(f"report: {out / 'report.html'}", style="bold", soft_wrap=True, highlight=False)


def _measure(job: Profiler, path: Path, console: Console) -> dict[str, Any]:
    """Run the profile with a bar for each of its phases, and the latest step beside it."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(24),
        TimeElapsedColumn(),
        TextColumn("{task.fields[line]}", style="dim"),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, Any] = {}

        def on_step(phase: str, done: float, line: str) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=1.0, line="")
            progress.update(tasks[phase], completed=done, line=line)

        return job.run(path, on_step).as_dict()
