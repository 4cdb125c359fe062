"""`sparing zoo`: the small models that come with the package."""

from pathlib import Path
from typing import Annotated

import typer

from sparing.cli.options import Device, Out, Seed

zoo = typer.Typer(help="List, train and describe the small models that come with sparing.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="A model of the zoo; see `sparing zoo list`.")]


@zoo.command("list")
def list_models() -> None:
    """List the models, their sizes and where their weights are."""
    from rich.console import Console
    from rich.table import Table

    from sparing.zoo import names, path, recipe

    table = Table("name", "weights", "what it is")
    for name in names(shipped=False):
        try:
            size = f"{(path(name) / 'model.safetensors').stat().st_size / 2**20:.1f} MiB"
        except ValueError:
            # One model that is missing from an installation does not hide the others.
            size = "not installed" if name in names() else "to be trained"
        table.add_row(name, size, recipe(name).summary)
    Console().print(table)


@zoo.command("train")
def train_model(
    name: Name,
    out: Out = Path("runs/zoo"),
    seed: Seed = 0,
    device: Device = "auto",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; PyTorch's choice.")] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=0, help="Processes that make batches ahead; 4 on a GPU, else 0.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of real pictures, for real-scenes-llava; see docs/zoo.md.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Go on from the last checkpoint.")] = True,
    shrink: Annotated[bool, typer.Option("--shrink", help="Two layers and a few steps, to try the recipe.")] = False,
) -> None:
    """Train a model, ask it held-out problems and write its card, in a folder of its own under --out."""
    from dataclasses import asdict

    from sparing.cli.options import device_of
    from sparing.cli.record import RunRecord
    from sparing.evaluate.environment import environment
    from sparing.zoo import recipe as find
    from sparing.zoo.card import measure, write_card
    from sparing.zoo.figures import training_seconds
    from sparing.zoo.train import train

    recipe = find(name).shrunk() if shrink else find(name)
    folder = out / name
    config = {"name": name, "shrink": shrink, "resume": resume, "device": device, "threads": threads}
    config |= {"data": str(data)} if data else {}
    with RunRecord(folder, config=config, seed=seed) as record:
        where = device_of(device)
        if workers is None:
            workers = 0 if where.type == "cpu" else 4
        model = train(
            recipe,
            folder,
            seed=seed,
            device=where.type,
            threads=threads,
            workers=workers,
            data=data,
            fresh=not resume,
        )
        figures = measure(recipe, model, per_task=5 if shrink else 400, seconds=training_seconds(folder), data=data)
        record.figures.update(asdict(figures))
        write_card(recipe, model, figures, environment=environment(), seed=seed, data=data)
    typer.echo(f"trained: {model}")


@zoo.command("card")
def show_card(name: Name) -> None:
    """Show the card of a model that comes with the package: how it was made, what it can do."""
    from rich.console import Console
    from rich.markdown import Markdown

    from sparing.zoo import path

    text = (path(name) / "README.md").read_text(encoding="utf-8")
    # The front matter is for the hub, not for readers.
    Console().print(Markdown(text.split("---\n", 2)[2]))
