"""The arguments that something was made with, read back from its attributes."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def kept_arguments(made: Any) -> dict[str, Any]:
    """The constructor's arguments, from the attributes of the same names.

    Raises:
        ValueError: an argument is not kept as an attribute.
    """
    cls = type(made)
    if cls.__init__ in (object.__init__, nn.Module.__init__):
        return {}
    found = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or not hasattr(made, name):
            raise ValueError(
                f"{cls.__name__} does not keep its argument {name!r}: set self.{name} in __init__, or override arguments()"
            )
        found[name] = getattr(made, name)
    return found
