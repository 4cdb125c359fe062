"""The `sparing` command: thin commands over the library."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: arguments without the program's name; those of the process if `None`.

    Returns:
        0 on success, 2 on bad usage or bad input, 130 when interrupted, 70 on a bug of ours.
    """
    from sparing.cli.app import app
    from sparing.cli.errors import run

    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    # `--debug` is the app's option, but people add it to the end of the line that failed: take it from
    # anywhere before a `--`, where words stop being options.
    end = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:end]
    options = [word for word in words[:end] if word != "--debug"]
    return run(app, ["--debug"] * debug + options + words[end:], debug=debug)
