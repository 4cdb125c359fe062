"""`sparing demo`: the profile of a model that comes with the package, on a page that it was not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparing.cli.options import Device, Out, Seed

MODEL = "arithmetic-llama"


def demo(
    out: Out = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Less text, additive search, short timing.")] = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Profile a small model that comes with sparing, offline, in a minute or two on two cores."""
    import torch

    from sparing import zoo
    from sparing.cli.profile import check_out, run_profile
    from sparing.evaluate import Settings

    check_out(out)
    # A model this small gains nothing from a second thread, and loses a lot where another program has the core.
    torch.set_num_threads(1)
    settings = Settings(seed=seed).quick() if quick else Settings(seed=seed)
    config = {"model": MODEL, "quick": quick, "device": device}
    run_profile(
        str(zoo.path(MODEL)),
        zoo.page("arithmetic"),
        "sparing's page of arithmetic",
        settings,
        out,
        config=config,
        device=device,
        dtype="float32",
    )
