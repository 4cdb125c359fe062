"""Options that every long command shares: annotate a parameter with them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    import torch

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps, ...")]
Dtype = Annotated[DtypeName, typer.Option("--dtype", help="Type of the weights; auto keeps the checkpoint's own.")]
Out = Annotated[
    Path,
    typer.Option("--out", file_okay=False, help="Folder of the results; a second run resumes in it."),
]

RemoteCode = Annotated[
    bool | None,
    typer.Option(
        "--trust-remote-code/--no-trust-remote-code",
        help="Run code that comes with the checkpoint, or go without; refused if it asks and neither is given.",
    ),
]


def device_of(name: str) -> torch.device:
    """The device that `--device` names; `auto` is the first GPU, else the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        # torch accepts any index until something is put there.
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(f"--device {name} is not available here: use auto or one of {', '.join(found)}") from error
    return device


def dtype_of(name: DtypeName) -> torch.dtype | Literal["auto"]:
    """The dtype that `--dtype` names, `"auto"` kept as it is for `from_pretrained`."""
    import torch

    return "auto" if name == "auto" else getattr(torch, name)


def places_of(given: Iterable[str] | None) -> dict[str, str]:
    """The folders that `--path NAME=FOLDER` names.

    Raises:
        ValueError: one names none.
    """
    places = {}
    for text in given or ():
        name, sign, folder = text.partition("=")
        if not sign or not name or not folder:
            raise ValueError(f"--path {text}: give NAME=FOLDER, such as data=/my/data")
        places[name] = folder
    return places
