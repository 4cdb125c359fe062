"""The typer app on which every command is registered.

A command is one file of this folder and its line below. `sparing --help` imports all that is imported here,
so heavy imports (torch, transformers, matplotlib) go inside the command's function: a test holds the help to
half a second.
"""

from typing import Annotated

import typer

import sparing
from sparing.cli.check import check
from sparing.cli.demo import demo
from sparing.cli.eval import evaluate
from sparing.cli.look import look
from sparing.cli.profile import profile
from sparing.cli.study import study
from sparing.cli.vica import vica
from sparing.cli.zoo import zoo

app = typer.Typer(
    name="sparing",
    help="Find out which computation a language model needs, and run only that.",
    rich_markup_mode="rich",
    # errors.py words the errors; typer's own traceback would print the locals, tensors included.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sparing {sparing.__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. Also accepted after a command.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Declare the options before a command; `main` acts on `--debug`, its callback on `--version`."""


# A command is a function; a family of commands is a typer app of its own.
app.command()(check)
app.command()(demo)
app.command("eval")(evaluate)
app.command()(look)
app.command()(profile)
app.add_typer(study, name="study")
app.add_typer(vica, name="vica")
app.add_typer(zoo, name="zoo")
