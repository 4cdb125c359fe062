"""`scenes-llava`'s recipe on other families: what differs is how a picture becomes tokens, and the decoder."""

from dataclasses import replace
from types import MappingProxyType

from sparing.zoo.scene_recipe import DECODER, SCENES_LLAVA, SMALL_STEPS

_VISION = SCENES_LLAVA.config["vision_config"]

# More is learnt from words, which are cheap, and counts among them; pictures then take fewer steps than scenes-llava's.
_TOLD = replace(SCENES_LLAVA.stages[2], rows=SMALL_STEPS[2].rows)
_SEEN = replace(
    SMALL_STEPS[4],
    steps=1300,
    cooldown=0.7,
    floor=0.05,
    weights=(0.8, 0.8, 1.0, 2.5, 0.2, 0.3, 5.0, 1.8, 1.0, 2.5, 0.3),
    distinct=False,
)
_STAGES = (*SMALL_STEPS[:2], _TOLD, replace(SMALL_STEPS[3], steps=800), _SEEN)

SCENES_ONEVISION = replace(
    SCENES_LLAVA,
    # A narrower decoder and twice the tokens: words and places take longer to come out of pictures.
    stages=(
        *_STAGES,
        replace(_SEEN, steps=900, weights=(0.5, 0.5, 1.2, 2.0, 0.2, 0.3, 4.0, 2.5, 2.5, 4.0, 0.2)),
    ),
    name="scenes-onevision",
    summary="The same questions for a LLaVA-OneVision with a SigLIP-style encoder and a Qwen2 decoder; every picture comes twice.",
    model_type="llava_onevision",
    config=MappingProxyType(
        {
            "vision_config": {
                **{key: value for key, value in _VISION.items() if key != "projection_dim"},
                "model_type": "siglip_vision_model",
                "vision_use_head": False,
            },
            "text_config": {
                **DECODER,
                "model_type": "qwen2",
                "hidden_size": 128,
                "intermediate_size": 344,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            },
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
            "tie_word_embeddings": False,
        }
    ),
)
SCENES_INTERNVL = replace(
    SCENES_LLAVA,
    # Four times as many patches go through the encoder.
    stages=(
        replace(_STAGES[0], steps=600, rows=12),
        *_STAGES[1:],
        # Places and relations had not been learnt. Asked for more, with few objects at first, places are; relations hardly.
        replace(
            _TOLD,
            steps=1500,
            weights=(0.5, 0.8, 0.6, 1.5, 0.1, 0.2, 2.0, 4.0, 6.0, 2.0, 0.2),
            growing=500,
            distinct=False,
        ),
        replace(_SEEN, steps=1800, weights=(0.6, 0.6, 1.2, 2.0, 0.2, 0.3, 4.0, 2.5, 2.0, 2.5, 0.2)),
    ),
    name="scenes-internvl",
    summary="The same questions for an InternVL with four of the encoder's patches in a visual token and a Qwen3 decoder.",
    model_type="internvl",
    config=MappingProxyType(
        {
            "vision_config": {
                "model_type": "internvl_vision",
                "hidden_size": 96,
                "intermediate_size": 384,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "image_size": 80,
                "patch_size": 4,
            },
            "text_config": {**DECODER, "model_type": "qwen3", "head_dim": 32},
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            "downsample_ratio": 0.5,
            "tie_word_embeddings": False,
        }
    ),
)
