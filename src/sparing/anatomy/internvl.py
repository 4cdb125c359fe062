"""InternVL: a ViT whose patches are shuffled together, several to a token; one to many tiles a picture; any known text decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparing.anatomy.vision import VisionAnatomy, both_sides, largest_of_block, transformer_flops
from sparing.tokens import ImageSpan


class InternVLAnatomy(VisionAnatomy):
    """`InternVLForConditionalGeneration`.

    Each tile is a span of its own: the inputs say how many tiles there are, but not which belong to one picture.
    """

    model_types = ("internvl",)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of a tile in tokens; one token covers several patches of the ViT."""
        height, width = super().grid
        return int(height * self.config.downsample_ratio), int(width * self.config.downsample_ratio)

    def layout(self) -> ImageSpan:
        """A tile."""
        height, width = self.grid
        return ImageSpan(0, height * width, self.grid)

    def feature_norms(self, features: Any, inputs: Mapping[str, Any]) -> Tensor:
        """A token has the largest of the patches that are shuffled into it."""
        return largest_of_block(self.patch_features(features).float().norm(dim=-1), self.grid).flatten()

    def encoder_flops(self) -> int:
        """One tile: patch embedding, all layers (class token included), and the projector after the shuffle."""
        vision = self.config.vision_config
        (rows, columns), (high, wide) = super().grid, both_sides(vision.patch_size)
        patches, d, out = rows * columns, vision.hidden_size, self.text_config.hidden_size
        embedding = 2 * patches * d * vision.num_channels * high * wide
        shuffled = d * int(1 / self.config.downsample_ratio) ** 2
        projector = 2 * self.layout().stop * out * (shuffled + out)
        return embedding + vision.num_hidden_layers * transformer_flops(vision, patches + 1) + projector
