"""Lenses: observe what tokens hold, and never change the result."""

from sparing.lens.classes import Criteria, token_classes
from sparing.lens.record import Recording, record

__all__ = ["Criteria", "Recording", "record", "token_classes"]
