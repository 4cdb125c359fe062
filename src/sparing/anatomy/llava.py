"""LLaVA-1.5: a CLIP encoder, a projector, and any known text decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparing.anatomy.vision import VisionAnatomy, transformer_flops
from sparing.tokens import ImageSpan


class LlavaAnatomy(VisionAnatomy):
    """`LlavaForConditionalGeneration`."""

    model_types = ("llava",)

    def layout(self) -> ImageSpan:
        """A picture; the `full` strategy keeps the class token in front of the patches."""
        (height, width), extra = self.grid, int(self.config.vision_feature_select_strategy == "full")
        return ImageSpan(0, height * width + extra, self.grid, offset=extra)

    def feature_norms(self, features: Any, inputs: Mapping[str, Any]) -> Tensor:
        """One patch, or the class token, a token."""
        return self.patch_features(features).float().norm(dim=-1).flatten()

    def encoder_flops(self) -> int:
        """Patch embedding, all layers (the tower runs them, whichever one is read), and the projector."""
        vision = self.config.vision_config
        height, width = self.grid
        patches, d = height * width, vision.hidden_size
        embedding = 2 * patches * d * vision.num_channels * vision.patch_size**2
        feature_layers = self.config.vision_feature_layer
        width_in = d * (len(feature_layers) if isinstance(feature_layers, list) else 1)
        out = self.text_config.hidden_size
        projector = 2 * self.layout().stop * out * (width_in + out)
        return embedding + vision.num_hidden_layers * transformer_flops(vision, patches + 1) + projector
