"""`sparing profile`: what a model needs on a text, or for questions about pictures, and the best plan within a budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sparing.cli.options import Device, Dtype, DtypeName, Out, RemoteCode, Seed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.console import Console
    from torch import nn

    from sparing.evaluate import Material, Profiler, Settings


def profile(
    model: Annotated[
        str, typer.Argument(help="A checkpoint's folder, a hub id, or a model of the zoo.", metavar="MODEL")
    ],
    text: Annotated[
        Path | None, typer.Option("--text", help="UTF-8 text to measure on, .txt or .gz.", metavar="FILE")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            "--images",
            help="Folder of pictures with a questions.jsonl beside them, to measure on instead of a text.",
            metavar="DIR",
        ),
    ] = None,
    budget: Annotated[float, typer.Option("--budget", help="Share of the prefill's operations to stay within.")] = 0.6,
    search: Annotated[
        Literal["greedy", "additive"],
        typer.Option("--search", help="greedy runs the best candidates of every step; additive is quicker."),
    ] = "greedy",
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Tokens of the text to use: half to choose on, half to report.")
    ] = 8192,
    window: Annotated[int, typer.Option("--window", min=8, help="Most tokens of a window of the text.")] = 256,
    max_questions: Annotated[
        int,
        typer.Option("--max-questions", min=1, help="Questions about pictures to use: half to choose, half to report."),
    ] = 128,
    quick: Annotated[
        bool, typer.Option("--quick", help="Less text, fewer questions, additive search, short timing.")
    ] = False,
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
    """Measure what each module and each kind of token is worth; find the best plan within a budget.

    On a text, or on questions about pictures; there image tokens are looked at by themselves too.

    A row of questions.jsonl: {"image": "a.png", "question": "...", "answer": "..."}, or "images" and a list.

    Without an answer, the stock model's own is the one to keep.

    Writes run.json, report.html and measurements.jsonl to --out. A second run goes on where the first one stopped.
    """
    if text is not None and images is not None:
        raise ValueError("--text and --images are two profiles: give one of them, and run the other into another --out")
    if text is None and images is None:
        raise ValueError("nothing to measure on: give --text FILE, or --images DIR for a vision-language model")
    from sparing.evaluate import PictureMaterial, Settings, TextMaterial, read_questions, read_text

    settings = Settings(
        budget=budget, method=search, max_tokens=max_tokens, window=window, max_questions=max_questions, seed=seed
    )
    settings = settings.quick() if quick else settings
    config = {"model": model, "text": text, "images": images, "quick": quick, "device": device, "dtype": dtype}
    check_out(out)
    questions = None if images is None else read_questions(images, settings.max_questions)
    words = "" if text is None else read_text(text)

    def make(loaded: nn.Module, processor: Any) -> Material:
        if questions is not None:
            return PictureMaterial(loaded, processor, questions)
        return TextMaterial(loaded, processor, words, max_tokens=settings.max_tokens, window=settings.window)

    run_profile(
        model,
        make,
        str(images or text),
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
    make: Callable[[nn.Module, Any], Material],
    source: str,
    settings: Settings,
    out: Path,
    *,
    config: dict[str, Any],
    device: str,
    dtype: DtypeName,
    trust_remote_code: bool | None = None,
    without_policies: bool = False,
    links: Mapping[str, str] | None = None,
) -> None:
    """Profile a model and leave `run.json` and `report.html` in `out`; bad input leaves the folder as it was.

    Args:
        model: a checkpoint's folder, or a hub id.
        make: the loaded model and its processor -> what it is profiled on.
        source: where that came from, for the report.
        settings: how to go about it.
        out: the folder of the results.
        config: the command's options, for the record.
        device: as `--device`.
        dtype: as `--dtype`.
        trust_remote_code: as `--trust-remote-code`.
        without_policies: as `--without-policies`.
        links: other pages to name in the report: words -> path.

    Raises:
        ValueError: the model follows policies, and would be profiled as another one.
    """
    import dataclasses
    import json

    from rich.console import Console

    from sparing.cli.models import load_model
    from sparing.cli.profile_summary import print_summary
    from sparing.cli.record import RunRecord
    from sparing.evaluate import PictureMaterial, Profiler
    from sparing.study import write_report

    loaded, processor, saved = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if saved and not without_policies:
        names = " & ".join(type(policy).__name__ for policy in saved)
        raise ValueError(
            f"{model} follows {names}, and a profile looks for a plan on top of none: --without-policies profiles its weights "
            "alone (in Python sparing.release(model) takes them off); `sparing check` measures it with them"
        )
    material = make(loaded, processor)
    job = Profiler(material, settings)
    console = Console()
    with RunRecord(out, config={**config, **dataclasses.asdict(settings)}, seed=settings.seed) as record:
        figures = _measure(job, out / "measurements.jsonl", console)
        figures[material.name]["file"] = source
        record.figures = figures
        record.write()
        run = json.loads(record.path.read_text(encoding="utf-8"))
        pictures = material.shown() if isinstance(material, PictureMaterial) else {}
        write_report(figures, {**run, "status": "finished"}, out / "report.html", pictures=pictures, links=links)
    print_summary(figures, console)
    console.print(f"report: {out / 'report.html'}", style="bold", soft_wrap=True, highlight=False)


def _measure(job: Profiler, path: Path, console: Console) -> dict[str, Any]:
    """Run the profile with a bar for each of its phases, and the latest step beside it."""
    from sparing.cli.progress import step_bars

    with step_bars(console, width=12) as progress:
        tasks: dict[str, Any] = {}

        def on_step(phase: str, done: float, line: str) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=1.0, line="")
            progress.update(tasks[phase], completed=done, line=line)

        return job.run(path, on_step).as_dict()
