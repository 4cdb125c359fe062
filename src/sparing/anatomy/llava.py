"""LLaVA-1.5: a CLIP or SigLIP encoder, a projector, and any known text decoder."""

from __future__ import annotations

from sparing.anatomy.vision import VisionAnatomy, transformer_flops
from sparing.tokens import ImageSpan


class LlavaAnatomy(VisionAnatomy):
    """`LlavaForConditionalGeneration`."""

    model_types = ("llava",)

    def layout(self) -> ImageSpan:
        """A picture; the `full` strategy keeps a class token in front of the patches, where the encoder has one."""
        (height, width), full = self.grid, self.config.vision_feature_select_strategy == "full"
        extra = int(full and self.class_token)
        return ImageSpan(0, height * width + extra, self.grid, offset=extra)

    @property
    def class_token(self) -> bool:  # type: ignore[override]
        """CLIP has one, SigLIP has not."""
        return not self.config.vision_config.model_type.startswith("siglip")

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
        positions = patches + int(self.class_token)
        return embedding + vision.num_hidden_layers * transformer_flops(vision, positions) + projector
