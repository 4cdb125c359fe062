"""Measures a trained zoo model and writes its card, whatever kind of model it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparing.zoo import scene_card, text_card
from sparing.zoo.figures import Figures
from sparing.zoo.recipe import Recipe
from sparing.zoo.scene_recipe import SceneRecipe
from sparing.zoo.text_recipe import TextRecipe


def measure(recipe: Recipe, folder: Path, *, per_task: int, seconds: float) -> Figures:
    """Asks a saved model `per_task` test problems of every kind, with its weights as they are saved.

    Raises:
        ValueError: nothing here measures models of such a recipe.
    """
    return _of(recipe).measure(folder, per_task=per_task, seconds=seconds)


def write_card(recipe: Recipe, folder: Path, figures: Figures, *, hardware: Mapping[str, Any], seed: int) -> None:
    """Writes `README.md`, the model card, into the folder of a trained model."""
    text = _of(recipe).card(recipe, figures, hardware=hardware, seed=seed)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _of(recipe: Recipe) -> Any:
    if isinstance(recipe, TextRecipe):
        return text_card
    if isinstance(recipe, SceneRecipe):
        return scene_card
    raise ValueError(f"expected a TextRecipe or a SceneRecipe, got a {type(recipe).__name__}: add a card for it")
