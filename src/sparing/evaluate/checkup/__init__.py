"""The check-up of a model: what of sparing is safe to use on it, measured."""

from sparing.evaluate.checkup.findings import MEANINGS, Checkup, Finding
from sparing.evaluate.checkup.running import checkup
from sparing.evaluate.checkup.subjects import NAMES, Subject, subjects_for

__all__ = ["MEANINGS", "NAMES", "Checkup", "Finding", "Subject", "checkup", "subjects_for"]
