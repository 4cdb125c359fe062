"""The one place where an exception becomes a line on stderr and an exit code."""

import errno
import traceback
from collections.abc import Sequence
from pathlib import Path

import typer

BAD_INPUT = 2
INTERNAL = 70  # EX_SOFTWARE of sysexits.h
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
INTERRUPTED = 130  # 128 + SIGINT, as shells report it

# What to install where an optional dependency is missing.
_EXTRAS = {
    "peft": "train",
    "trl": "train",
    "lm_eval": "eval",
    "math_verify": "eval",
    "sacrebleu": "eval",
    "ray": "study",
    "omnisteval": "stream",
}


class Interrupted(Exception):
    """Ctrl-C in a run that keeps its results. Not a `KeyboardInterrupt`: typer swallows those."""

    def __init__(self, kept_in: Path) -> None:
        super().__init__(f"interrupted; what was finished is kept in {kept_in}")


def run(app: typer.Typer, argv: Sequence[str], *, debug: bool) -> int:
    """Run `app` and return the exit code, wording every exception on the way.

    Args:
        app: the typer app.
        argv: arguments without the program's name.
        debug: show the traceback before the line.
    """
    try:
        code = app(args=list(argv), prog_name="sparing", standalone_mode=False)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exception(error)
        line, code = explain(error)
        _print(line)
        return code
    if code == INTERRUPTED:
        _print("interrupted")
    # Commands return None; an int is the code of a `typer.Exit`.
    return code if isinstance(code, int) else 0


def explain(error: Exception) -> tuple[str, int]:
    """Word an exception: the line for stderr, and the exit code.

    Expected are the ones that a user can mend, and their message says how. Everything else is a bug of ours.
    """
    message = " ".join(str(error).split()) or type(error).__name__
    # By name, because importing torch to report a typing mistake would take seconds.
    names = {parent.__name__ for parent in type(error).__mro__}
    if isinstance(error, Interrupted):
        return message, INTERRUPTED
    if isinstance(error, typer.Abort):
        return "interrupted", INTERRUPTED
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context else ""
        return f"error: {' '.join(error.format_message().split())}{hint}", BAD_INPUT
    # safetensors reports a full disk as an error of its own.
    if getattr(error, "errno", None) in NO_SPACE or "No space left on device" in message:
        file = getattr(error, "filename", None)
        where = f" while writing {file}" if file else ""
        return f"error: no space left on the disk{where}: free space, or choose another --out", BAD_INPUT
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"error: {error.strerror}: {error.filename}", BAD_INPUT
    if isinstance(error, ModuleNotFoundError) and error.name in _EXTRAS:
        cure = f"pip install 'sparing[{_EXTRAS[error.name]}]'"
        return f"error: {error.name} is not installed: {cure}", BAD_INPUT
    if isinstance(error, MemoryError) or "OutOfMemoryError" in names:
        return f"error: out of memory: use a smaller batch, or a smaller --dtype ({message})", BAD_INPUT
    if isinstance(error, (ValueError, OSError)) or "SafetensorError" in names:
        return f"error: {message}", BAD_INPUT
    return f"internal error: {type(error).__name__}: {message} (rerun with --debug and report it)", INTERNAL


def _print(line: str) -> None:
    from rich.console import Console
    from rich.text import Text

    # `Text`, so that brackets in a message are not markup; soft wrap, so that it stays one line in a log.
    Console(stderr=True).print(Text(line, style="red"), soft_wrap=True)
