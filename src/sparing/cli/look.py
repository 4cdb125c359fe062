"""`sparing look`: what the visual tokens of a picture are, as a page to explore."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparing.cli.options import Device, Dtype, Out, RemoteCode, Seed

if TYPE_CHECKING:
    from rich.console import Console

    from sparing.evaluate.looking import Look
    from sparing.tokens import TokenProfile

PROFILE = "token_profile.json"
"""The file of a checkpoint's token profile: looked for beside it, written to `--out`."""
FOUND_ON = 24


def look(
    images: Annotated[
        list[str] | None,
        typer.Argument(help="Pictures; `demo`, or none, is a drawn scene.", metavar="[IMAGE]...", show_default=False),
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
    from sparing.evaluate.pictures import demo_picture, neutral_question, open_picture, pictures_in
    from sparing.study.pages.look_page import write_look

    check_out(out)
    asked = question
    shown = []
    for name in images or ["demo"]:
        if name == "demo" and not Path(name).exists():
            drawn, about = demo_picture(seed)
            shown.append(drawn)
            asked = asked or about
        else:
            shown.append(open_picture(name))
    samples = pictures_in(pictures, FOUND_ON) if pictures is not None else None
    loaded, processor, saved = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    tokenizer = getattr(processor, "tokenizer", processor)
    if images and "demo" not in images or not _knows(tokenizer, asked):
        asked = question
    asked = asked or neutral_question(tokenizer)
    # Refused before anything slow begins.
    ask(loaded, processor, [asked], [[one.image for one in shown]])
    console = Console()
    config = {"images": images or ["demo"], "model": model, "question": asked, "profile": profile, "pictures": pictures}
    config |= {"top": top, "controls": controls, "max_new_tokens": max_new_tokens, "repeats": repeats}
    config |= {"device": device, "dtype": dtype}
    beside = Path(model) / PROFILE
    given = profile or (beside if beside.is_file() else None)
