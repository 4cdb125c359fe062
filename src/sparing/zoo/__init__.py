"""Small models that come with the package, so that everything can be tried offline.

Each is an ordinary Hugging Face folder (`path(name)`), trained on a world of `sparing.worlds` by a recipe
(`recipe(name)`) that anyone can run again: `sparing zoo train NAME`. Some are recipes only: `real-scenes-llava`, whose pictures
are not ours to ship, and neither are weights made from them; `scenes-onevision` and `scenes-internvl`, other families for studies.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from sparing.zoo.real_scene_recipe import REAL_SCENES_LLAVA
from sparing.zoo.recipe import Recipe
from sparing.zoo.scene_backbone_recipes import SCENES_INTERNVL, SCENES_ONEVISION
from sparing.zoo.scene_recipe import SCENES_LLAVA
from sparing.zoo.text_recipe import ARITHMETIC_LLAMA

__all__ = ["Recipe", "names", "page", "path", "recipe"]

SHIPPED = (ARITHMETIC_LLAMA, SCENES_LLAVA)
RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {made.name: made for made in (*SHIPPED, REAL_SCENES_LLAVA, SCENES_ONEVISION, SCENES_INTERNVL)}
)

_ROOM = Path(__file__).parent


def names(*, shipped: bool = True) -> tuple[str, ...]:
    """Returns the names of the models whose weights are shipped; with `shipped=False`, of all that can be trained."""
    return tuple(made.name for made in SHIPPED) if shipped else tuple(RECIPES)


def recipe(name: str) -> Recipe:
    """Returns the recipe of a model.

    Raises:
        ValueError: the zoo has no such model.
    """
    if name not in RECIPES:
        raise ValueError(f"expected a model of the zoo ({', '.join(RECIPES)}), got {name!r}")
    return RECIPES[name]


def path(name: str) -> Path:
    """Returns the folder of a model's shipped weights, for `from_pretrained` or `sparing.load`.

    Raises:
        ValueError: the zoo has no such model, its weights are missing from this installation, or they are not shipped.
    """
    folder = _ROOM / "weights" / recipe(name).name
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"expected the weights of {name} in {folder}; train them: sparing zoo train {name}")
    return folder


def page(world: str = "arithmetic") -> str:
    """Returns a page of text of a world, from its test split, to look at a model with."""
    return (_ROOM / "pages" / f"{world}.txt").read_text(encoding="utf-8")
