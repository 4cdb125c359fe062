"""`sparing look`: what the visual tokens of a picture are, as a page to explore."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparing.cli.options import Device, Dtype, Out, RemoteCode, Seed

if TYPE_CHECKING:
    from rich.console import Console

    from sparing.evaluate.looking import Look
    from sparing.evaluate.pictures.files import OpenedPicture
    from sparing.tokens import TokenProfile

PROFILE = "token_profile.json"
"""The file of a checkpoint's token profile: looked for beside it, written to `--out`."""
FOUND_ON = 50


def look(
    images: Annotated[
        list[str] | None,
        typer.Argument(help="Pictures; `demo`, or none, is a drawn scene.", metavar="IMAGE", show_default=False),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", help="A checkpoint's folder, a hub id, or a zoo model.")
    ] = "scenes-llava",
    question: Annotated[
        str | None, typer.Option("--question", help="What to ask about the pictures; what is in them by default.")
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option("--profile", help=f"The model's token profile; {PROFILE} beside the checkpoint by default."),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            "--pictures",
            help=f"Without a profile: a folder of pictures to find the classes on ({FOUND_ON} at most); drawn scenes by default.",
        ),
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, max=50, help="Words a token and level.")] = 10,
    controls: Annotated[int, typer.Option("--controls", min=0, help="Random controls of each answer.")] = 3,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")] = 24,
    repeats: Annotated[int, typer.Option("--repeats", min=0, help="Timed prefills of each answer; 0 for none.")] = 3,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = None,
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
    out: Out = Path("runs/look"),
) -> None:
    """Show what each visual token of a picture is: its words at every level, its class, and the answer without it.

    Writes look.html (one file, asks for nothing), run.json, and the token profile where one was found, to --out.
    """
    import json

    from rich.console import Console

    from sparing.anatomy import ask
    from sparing.cli.models import load_model
    from sparing.cli.profile import check_out
    from sparing.cli.record import RunRecord
    from sparing.evaluate.looking import look as gather
    from sparing.evaluate.pictures.files import demo_picture, neutral_question, open_picture, pictures_in
    from sparing.study.pages.look_page import write_look
    from sparing.tokens import TokenProfile

    check_out(out)
    demo, about = demo_picture(seed)
    shown = [demo if name == "demo" and not Path(name).exists() else open_picture(name) for name in images or ["demo"]]
    samples = None if pictures is None else pictures_in(pictures, FOUND_ON)
    loaded, processor, saved = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    asked = question or neutral_question(processor, about if shown == [demo] else None)
    # Refused before anything slow begins.
    ask(loaded, processor, [asked], [[one.image for one in shown]])
    beside = Path(model) / PROFILE
    given = profile or (beside if samples is None and beside.is_file() else None)
    known = None if given is None else TokenProfile.load(given, loaded)
    console = Console()
    config = {"images": images or ["demo"], "model": model, "question": asked, "profile": profile, "pictures": pictures}
    config |= {"top": top, "controls": controls, "max_new_tokens": max_new_tokens, "repeats": repeats}
    config |= {"device": device, "dtype": dtype}
    with RunRecord(out, config=config, seed=seed) as record, _steps(console) as on_step:
        source = f"As the profile {given} tells them"
        if known is None:
            known, source = _find(loaded, processor, samples, seed, on_step)
            known.save(out / PROFILE)
        found = gather(
            loaded,
            processor,
            shown,
            asked,
            known,
            source=source,
            k=top,
            seeds=controls,
            max_new_tokens=max_new_tokens,
            repeats=repeats,
            on_step=on_step,
        )
        notes = found.notes
        if saved:
            names = " & ".join(type(policy).__name__ for policy in saved)
            notes += (f"The checkpoint follows {names}; this looks at its weights alone.",)
        # As it was called, not where it lies.
        found = dataclasses.replace(found, notes=notes, model={**found.model, "name": model})
        record.figures = found.as_dict()
        record.write()
        run = json.loads(record.path.read_text(encoding="utf-8"))
        write_look(found, {**run, "status": "finished"}, out / "look.html")
    _print(found, console)
    page = out / "look.html"
    console.print(f"page: {page}", style="bold", soft_wrap=True, highlight=False)
    if open_page:
        typer.launch(page.resolve().as_uri())


@contextlib.contextmanager
def _steps(console: Console) -> Iterator[Callable[[str], None]]:
    """What is being done, and for how long; gone when it is done."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda line: progress.update(task, description=line)


def _find(
    loaded: Any,
    processor: Any,
    samples: Sequence[OpenedPicture] | None,
    seed: int,
    on_step: Callable[[str], None],
) -> tuple[TokenProfile, str]:
    """Find the model's token profile; and what it was found on, in words."""
    from sparing.evaluate.pictures.files import drawn_pictures
    from sparing.lens import token_classes

    what = "pictures" if samples else "drawn scenes (name a folder of pictures with --pictures)"
    samples = samples or drawn_pictures(FOUND_ON, seed)

    def tell(done: float, line: str) -> None:
        on_step(f"finding the classes of visual tokens: {line} ({done:.0%})")

    found = token_classes(loaded, processor, [one.image for one in samples], seed=seed, on_step=tell)
    return found, f"Found on {len(samples)} {what}"


def _print(found: Look, console: Console) -> None:
    """Question and answer, the classes' shares, and the answer without each."""
    from rich.text import Text

    console.print(Text.assemble((found.question, "dim"), "  ", (found.answer or "(nothing)", "bold")), soft_wrap=True)
    every = max(1, len(found.index))
    shares = ", ".join(f"{n} {name} ({n / every:.0%})" for name, n in found.classes.counts.items() if n)
    console.print(Text(f"{len(found.index)} visual tokens: {shares}"), soft_wrap=True)
    for arm in found.arms[1:]:
        if arm.why:
            continue
        same = sum(control.text == found.answer for control in arm.controls)
        said = [] if arm.answer is None else [arm.answer.text or "(nothing)"]
        said += [f"{same} of {len(arm.controls)} at random answer the same"] if arm.controls else []
        line = f"  without {arm.name} ({arm.dropped}, {arm.flops:.0%} of the operations): {'; '.join(said)}"
        changed = arm.answer is not None and arm.answer.text != found.answer
        console.print(Text(line, style="yellow" if changed else ""), soft_wrap=True)
    for note in (*found.classes.notes, *found.notes):
        console.print(Text(note, style="dim"), soft_wrap=True)
