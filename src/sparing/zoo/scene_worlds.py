"""The world that a scene recipe trains on."""

from pathlib import Path

from sparing.worlds.grids import GridWorld
from sparing.worlds.real_scenes import RealSceneSpec, RealScenesWorld
from sparing.worlds.scenes import SceneSpec, ScenesWorld
from sparing.zoo.scene_recipe import SceneRecipe


def world_of(recipe: SceneRecipe, data: Path | None = None) -> GridWorld:
    """Returns the world of a recipe: one of its patches is what one visual token sees.

    Args:
        recipe: what is to be trained or measured.
        data: the folder of real pictures, where the world is made of them.

    Raises:
        FileNotFoundError: the world's pictures are not in `data`.
        ValueError: the world needs a folder and none is named.
    """
    vision = recipe.config["vision_config"]
    # InternVL shuffles several of the encoder's patches into a token.
    patch = round(vision["patch_size"] / recipe.config.get("downsample_ratio", 1))
    rows = vision["image_size"] // patch
    if recipe.world == "scenes":
        return ScenesWorld(SceneSpec(rows=rows, columns=rows, patch=patch))
    if data is None:
        raise ValueError(
            f"expected a folder with mnist/train.npz and cifar10/train.parquet for {recipe.name}, got none: name it (--data DIR)"
        )
    return RealScenesWorld.open(data, RealSceneSpec(rows=rows, columns=rows, patch=patch))
