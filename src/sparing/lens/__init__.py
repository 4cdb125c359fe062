"""Lenses: observe what tokens hold, and never change the result."""

from sparing.lens.record import Recording, record

__all__ = ["Recording", "record"]
