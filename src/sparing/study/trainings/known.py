"""Trainings by the names that a study's YAML calls them."""

from __future__ import annotations

from sparing.study.names import with_plugins
from sparing.study.trainings.scenes import SceneTraining, TwoSceneStages
from sparing.study.trainings.training import Training

OURS: dict[str, type[Training]] = {"scenes": SceneTraining, "scenes_two_stages": TwoSceneStages}


def known_trainings() -> dict[str, type[Training]]:
    """Trainings by name: ours, and those of installed packages (entry point group `sparing.trainings`)."""
    return with_plugins(OURS, "sparing.trainings")
