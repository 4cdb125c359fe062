"""InternVL: a ViT whose patches are shuffled together, several to a token; one to many tiles a picture; any known text decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sparing.anatomy.base import HFModule
from sparing.anatomy.encoder import Fold, folded
from sparing.anatomy.vision import VisionAnatomy, both_sides, transformer_flops
from sparing.tokens import ImageSpan


class InternVLAnatomy(VisionAnatomy):
    """`InternVLForConditionalGeneration`.

    Each tile is a span of its own: the inputs say how many tiles there are, but not which belong to one picture.
    """

    model_types = ("internvl",)
    class_token = True

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of a tile in tokens; one token covers several patches of the ViT."""
        height, width = super().grid
        return int(height * self.config.downsample_ratio), int(width * self.config.downsample_ratio)

    def layout(self) -> ImageSpan:
        """A tile."""
        height, width = self.grid
        return ImageSpan(0, height * width, self.grid)

    @property
    def encoder_attentions(self) -> Sequence[HFModule]:
        """The attention modules of the encoder's layers."""
        return [layer.attention for layer in self.vision_encoder.encoder.layer]

    def encoder_query_key(self, layer: int, asking: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """As in `EncoderAnatomy`, with the norms that some of these encoders have."""
        attention = self.encoder_attentions[layer]
        query, key = attention.q_norm(attention.q_proj(asking)), attention.k_norm(attention.k_proj(asked))
        size = (-1, attention.head_dim)
        return query.unflatten(-1, size) * attention.scale, key.unflatten(-1, size)

    def of_tokens(self, values: Tensor, inputs: Mapping[str, Any], fold: Fold) -> Tensor:
        """A token covers the patches that are shuffled into it."""
        return folded(self.read_positions(values), self.grid, fold).flatten(0, 1)

    def encoder_flops(self) -> int:
        """One tile: patch embedding, all layers (class token included), and the projector after the shuffle."""
        vision = self.config.vision_config
        (rows, columns), (high, wide) = super().grid, both_sides(vision.patch_size)
        patches, d, out = rows * columns, vision.hidden_size, self.text_config.hidden_size
        embedding = 2 * patches * d * vision.num_channels * high * wide
        shuffled = d * int(1 / self.config.downsample_ratio) ** 2
        projector = 2 * self.layout().stop * out * (shuffled + out)
        return embedding + vision.num_hidden_layers * transformer_flops(vision, patches + 1) + projector
