"""The scenes that models of the zoo are trained on and asked about: drawn ones, or those of real pictures."""

import functools
from pathlib import Path

from sparing.worlds.grids import GridWorld
from sparing.worlds.real_scenes import RealScenesWorld
from sparing.worlds.real_scenes.gallery import DIGITS_FILE, PHOTOS_FILE
from sparing.worlds.scenes import WORLD


def scene_world(data: Path | None = None) -> GridWorld:
    """Returns the world of scenes: drawn ones, or with a data folder those of its digits and photographs (opened once).

    Raises:
        ValueError: the folder lacks a file, or a file holds something else.
    """
    return WORLD if data is None else _opened(data.absolute())


def scene_files(data: Path | None = None) -> tuple[Path, ...]:
    """The files that scenes are made of."""
    return () if data is None else (data / DIGITS_FILE, data / PHOTOS_FILE)


@functools.cache
def _opened(data: Path) -> GridWorld:
    try:
        return RealScenesWorld.open(data)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
