"""Checkpoints: a model with the policies it follows, written whole or not at all, and never loaded without them."""

from sparing.checkpoint.reading import about, load, release
from sparing.checkpoint.registry import known_policies
from sparing.checkpoint.writing import save
from sparing.execute import run_of

__all__ = ["about", "known_policies", "load", "release", "run_of", "save"]
