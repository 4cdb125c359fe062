"""Measures a trained zoo model and writes its card, whatever kind of model it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparing.zoo import scene_card, text_card
from sparing.zoo.figures import Figures
from sparing.zoo.recipe import Recipe
from sparing.zoo.scene_recipe import SceneRecipe
from sparing.zoo.scene_worlds import world_of
from sparing.zoo.text_recipe import TextRecipe


def measure(recipe: Recipe, folder: Path, *, per_task: int, seconds: float, data: Path | None = None) -> Figures:
    """Asks a saved model `per_task` test problems of every kind, with its weights as they are saved.

    A recipe whose world is made of real pictures needs the folder `data` that holds them.

    Raises:
        FileNotFoundError: real pictures are not in `data`.
        ValueError: nothing here measures models of such a recipe, or it needs `data` and there is none.
    """
    if isinstance(recipe, TextRecipe):
        return text_card.measure(folder, per_task=per_task, seconds=seconds)
    if isinstance(recipe, SceneRecipe):
        return scene_card.measure(folder, per_task=per_task, seconds=seconds, world=world_of(recipe, data))
    raise _unknown(recipe)


def write_card(
    recipe: Recipe,
    folder: Path,
    figures: Figures,
    *,
    environment: Mapping[str, Any],
    seed: int,
    data: Path | None = None,
) -> None:
    """Writes `README.md`, the model card, into the folder of a trained model."""
    if isinstance(recipe, TextRecipe):
        text = text_card.card(recipe, figures, environment=environment, seed=seed)
    elif isinstance(recipe, SceneRecipe):
        text = scene_card.card(recipe, figures, environment=environment, seed=seed, world=world_of(recipe, data))
    else:
        raise _unknown(recipe)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _unknown(recipe: Recipe) -> ValueError:
    return ValueError(f"expected a TextRecipe or a SceneRecipe, got a {type(recipe).__name__}: add a card for it")
