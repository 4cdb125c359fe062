"""LLaVA-1.5: a CLIP encoder, a projector, and any known text decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparing.anatomy.base import Anatomy, HFModule
from sparing.tokens import ImageSpan


class LlavaAnatomy(Anatomy):
    """`LlavaForConditionalGeneration` with a decoder of the Llama layout."""

    model_types = ("llava",)

    @property
    def decoder(self) -> HFModule:
        """The language model inside."""
        return self.model.model.language_model

    @property
    def vision_encoder(self) -> HFModule:
        """The vision tower."""
        return self.model.model.vision_tower

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of a picture's token grid."""
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        return side, side

    @property
    def tokens_per_image(self) -> int:
        """Image tokens of one picture; the `full` strategy keeps the class token in front of the patches."""
        height, width = self.grid
        return height * width + (self.config.vision_feature_select_strategy == "full")

    def is_image_token(self, input_ids: Tensor) -> Tensor:
        """Which ids are `<image>` placeholders."""
        return input_ids == self.config.image_token_id

    def image_spans(self, inputs: Mapping[str, Any], is_image: Tensor) -> tuple[tuple[ImageSpan, ...], ...]:
        """Cut the image tokens of each row into pictures of the encoder's fixed size.

        Raises:
            ValueError: a row's image tokens are not a whole number of pictures.
        """
        size, rows = self.tokens_per_image, []
        for r, row in enumerate(is_image):
            where = row.nonzero().flatten().tolist()
            if len(where) % size:
                raise ValueError(
                    f"row {r} has {len(where)} image tokens, but this model makes {size} a picture: "
                    "build the inputs with the model's own processor"
                )
            spans = []
            for i in range(0, len(where), size):
                start, stop = where[i], where[i + size - 1] + 1
                if stop - start != size:
                    raise ValueError(
                        f"row {r}: the image tokens from {start} on are interrupted by text after fewer than {size}"
                    )
                spans.append(ImageSpan(start, stop, self.grid))
            rows.append(tuple(spans))
        return tuple(rows)

    def encoder_flops(self) -> int:
        """Patch embedding, the layers up to the one that is read, and the projector."""
        vision = self.config.vision_config
        height, width = self.grid
        n, d = height * width + 1, vision.hidden_size
        patch = 2 * (n - 1) * d * vision.num_channels * vision.patch_size**2
        layer = 8 * n * d * d + 4 * n * n * d + 4 * n * d * vision.intermediate_size
        # The tower runs all its layers, whichever one is read.
        projector = 2 * self.tokens_per_image * self.text_config.hidden_size
        feature_layers = self.config.vision_feature_layer
        width_in = d * (len(feature_layers) if isinstance(feature_layers, list) else 1)
        return patch + vision.num_hidden_layers * layer + projector * (width_in + self.text_config.hidden_size)
