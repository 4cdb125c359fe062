"""What to offer where a name is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

FEW = 30


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown name: the nearest ones, or all where none is near and there are few."""
    known = sorted(known)
    folded = {_folded(k): k for k in known}
    if near := difflib.get_close_matches(_folded(name), folded, n=3, cutoff=0.55):
        return f"; did you mean {' or '.join(folded[n] for n in near)}?"
    return f"; known are {', '.join(known) or 'none'}" if len(known) <= FEW else ""


def _folded(name: str) -> str:
    return name.casefold().replace("_", "").replace("-", "")
