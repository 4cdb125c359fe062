"""`sparing demo`: profiles of the two models that come with the package, one on a page of text, one on pictures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparing.cli.options import Device, Out, Seed

if TYPE_CHECKING:
    from torch import nn

    from sparing.evaluate import Material

TEXT_MODEL, PICTURE_MODEL = "arithmetic-llama", "scenes-llava"
# Questions of each of the eleven tasks, each about a picture of its own; and how many of them a quick demo asks.
PER_TASK, PER_TASK_QUICK, QUICK = 3, 2, 16
# Pictures are most of a prompt, and most of what is computed for them can go: a budget that text would not survive.
PICTURE_BUDGET = 0.3


def demo(
    out: Out = Path("runs/demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Less text, fewer pictures, additive search, short timing.")
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Profile the two small models that come with sparing, offline, in a minute on two cores: one on text, one on pictures.

    Writes a report of each to --out, report.html and pictures/report.html, with the pictures drawn for it in scenes/.
    """
    import torch

    from sparing import zoo
    from sparing.cli.profile import check_out, run_profile
    from sparing.evaluate import PictureMaterial, Settings, TextMaterial, read_questions
    from sparing.evaluate.pictures.drawn import draw_scenes

    check_out(out)
    models = {name: str(zoo.path(name)) for name in (TEXT_MODEL, PICTURE_MODEL)}
    # Models this small gain nothing from a second thread, and lose a lot where another program has the core.
    torch.set_num_threads(1)
    settings = Settings(seed=seed)
    if quick:
        settings = dataclasses.replace(settings.quick(), max_tokens=1024, batches=(1,))

    def on_text(model: nn.Module, tokenizer: Any) -> Material:
        page = zoo.page("arithmetic")
        return TextMaterial(model, tokenizer, page, max_tokens=settings.max_tokens, window=settings.window)

    run_profile(
        models[TEXT_MODEL],
        on_text,
        "sparing's page of arithmetic",
        settings,
        out,
        config={"model": TEXT_MODEL, "quick": quick, "device": device},
        device=device,
        dtype="float32",
        links={f"{PICTURE_MODEL}, on pictures": "pictures/report.html"},
    )
    folder = out / "scenes"
    draw_scenes(folder, PER_TASK_QUICK if quick else PER_TASK, seed)
    questions = read_questions(folder, QUICK if quick else None)
    settings = dataclasses.replace(
        settings, budget=PICTURE_BUDGET, method="additive", repeats=min(settings.repeats, 3), steps=8
    )

    def on_pictures(model: nn.Module, processor: Any) -> Material:
        return PictureMaterial(model, processor, questions)

    run_profile(
        models[PICTURE_MODEL],
        on_pictures,
        str(folder),
        settings,
        out / "pictures",
        config={"model": PICTURE_MODEL, "images": folder, "quick": quick, "device": device},
        device=device,
        dtype="float32",
        links={f"{TEXT_MODEL}, on text": "../report.html"},
    )
