"""sparing: find out which computation a language model needs, and run only that."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0.dev0"

# Names are looked up when first used: `import sparing` and the command line's help stay instant.
_HOMES = {
    "TokenMap": "sparing.anatomy",
    "Group": "sparing.tokens",
    "ImageSpan": "sparing.tokens",
    "LayerPlan": "sparing.plan",
    "Ledger": "sparing.plan",
    "Policy": "sparing.plan",
    "apply": "sparing.execute",
    "run_of": "sparing.execute",
    "VisionPrefix": "sparing.execute",
    "load": "sparing.checkpoint",
    "release": "sparing.checkpoint",
    "save": "sparing.checkpoint",
}
_ROOMS = (
    "tokens",
    "plan",
    "anatomy",
    "execute",
    "policies",
    "checkpoint",
    "ablate",
    "lens",
    "evaluate",
    "study",
    "train",
    "worlds",
    "zoo",
)

__all__ = [*_HOMES, *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"sparing.{name}")
    if name in _HOMES:
        module = importlib.import_module(_HOMES[name])
        return getattr(importlib.import_module("sparing.tokens") if name == "TokenMap" else module, name)
    raise AttributeError(f"module 'sparing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
