"""Carry plans out: `dense` defines the meaning, `gathered` is fast; `apply` puts either under a model."""

from sparing.execute.apply import Run, apply, run_of
from sparing.execute.cache import PlannedCache, RaggedLayer, RunState
from sparing.execute.check import check_policy
from sparing.execute.prefix import VisionPrefix

__all__ = ["PlannedCache", "RaggedLayer", "Run", "RunState", "VisionPrefix", "apply", "check_policy", "run_of"]
