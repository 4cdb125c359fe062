"""What to offer where a name is not known: for everything that tasks and studies call by name."""

from sparing.tokens.names import nearest

__all__ = ["nearest"]
