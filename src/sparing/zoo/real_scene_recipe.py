"""The recipe of `real-scenes-llava`: `scenes-llava` on handwritten digits and photographs."""

from dataclasses import replace
from types import MappingProxyType

from sparing.zoo.scene_recipe import SCENES_LLAVA, Stage

REAL_SCENES_LLAVA = replace(
    SCENES_LLAVA,
    name="real-scenes-llava",
    summary="scenes-llava on real handwritten digits and photographs; not shipped, trained from a folder that holds them.",
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
        }
    ),
    stages=(Stage(goal="patches", steps=1500, rows=8, questions=1, lr=1e-3, most=80),),
    # digit photo colour cell background behind count relation point blind
    weights=(1.5, 1.5, 0.8, 2.0, 0.2, 0.3, 2.5, 2.5, 2.0, 0.3),
)
