"""The recipe of `real-scenes-llava`: `scenes-llava` on handwritten digits and photographs."""

from dataclasses import replace
from types import MappingProxyType

from sparing.zoo.scene_recipe import DECODER, SCENES_LLAVA, SMALL_STEPS, Stage


def _weights(drawn: tuple[float, ...]) -> tuple[float, ...]:
    """How often each task is asked, from how often `scenes-llava` is asked what comes nearest to it."""
    shape, colour, letter, cell, background, behind, count, relation, point, _, blind = drawn
    return (letter, shape, colour, cell, background, behind, count, relation, point, blind)


def _stage(drawn: Stage) -> Stage:
    """A stage of `scenes-llava`, for real things."""
    if drawn.goal == "patches":
        # Reading handwriting and photographs takes far more of them than telling six shapes apart: crowded scenes.
        return replace(drawn, steps=4 * drawn.steps, rows=8, most=80)
    return replace(drawn, weights=drawn.weights and _weights(drawn.weights))


REAL_SCENES_LLAVA = replace(
    SCENES_LLAVA,
    name="real-scenes-llava",
    summary="The same on real handwritten digits and photographs, with a wider encoder; trained from a folder of them.",
    world="real-scenes",
    config=MappingProxyType(
        {
            **SCENES_LLAVA.config,
            "vision_config": {
                **SCENES_LLAVA.config["vision_config"],
                "hidden_size": 192,
                "intermediate_size": 768,
                "image_size": 160,
                "patch_size": 16,
                "projection_dim": 192,
            },
            "text_config": {**DECODER, "model_type": "llama"},
        }
    ),
    stages=tuple(_stage(drawn) for drawn in SMALL_STEPS),
    weights=_weights(SCENES_LLAVA.weights),
)
