"""Tasks by name: ours, and those of installed packages."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import entry_points

from sparing.evaluate.names import nearest
from sparing.evaluate.task import Task


@functools.cache
def known_tasks() -> Mapping[str, type[Task]]:
    """Names and classes: ours, and those that other packages offer (entry point group `sparing.tasks`); ours win."""
    from sparing.evaluate.tasks.generation import GenerationTask
    from sparing.evaluate.tasks.harness import ChoiceTask, HarnessTask
    from sparing.evaluate.tasks.lmms import LmmsTask
    from sparing.evaluate.tasks.patch_benchmark import PatchBenchmarkTask
    from sparing.evaluate.tasks.perplexity import PerplexityTask
    from sparing.evaluate.tasks.scene_lens import SceneLensTask
    from sparing.evaluate.tasks.scene_transplant import SceneTransplantTask
    from sparing.evaluate.tasks.scenes import ScenesTask
    from sparing.evaluate.tasks.timing import SpeedTask

    found: dict[str, type[Task]] = {
        "harness": HarnessTask,
        "choice": ChoiceTask,
        "perplexity": PerplexityTask,
        "generation": GenerationTask,
        "speed": SpeedTask,
        "lmms": LmmsTask,
        "scenes": ScenesTask,
        "patch_benchmark": PatchBenchmarkTask,
        "scene_lens": SceneLensTask,
        "scene_transplant": SceneTransplantTask,
    }
    for point in entry_points(group="sparing.tasks"):
        found.setdefault(point.name, point.load())
    return found


def task_class(name: str) -> type[Task]:
    """The class of a task's name.

    Raises:
        ValueError: there is none; the message offers the nearest names.
    """
    known = known_tasks()
    if name not in known:
        raise ValueError(f"there is no kind of task {name!r}{nearest(name, known)}")
    return known[name]
