"""SmolVLM: a SigLIP encoder whose patches are shuffled together, several to a token; one or many tiles; any known text decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sparing.anatomy.base import HFModule
from sparing.anatomy.encoder import Fold, folded
from sparing.anatomy.vision import VisionAnatomy, both_sides, transformer_flops


class SmolVLMAnatomy(VisionAnatomy):
    """`SmolVLMForConditionalGeneration`.

    Each tile is a span of its own; the tokens between tiles that name their row and column are text.
    """

    model_types = ("smolvlm",)

    @property
    def decoder(self) -> HFModule:
        """The language model inside."""
        return self.model.model.text_model

    @property
    def vision_encoder(self) -> HFModule:
        """The vision transformer."""
        return self.model.model.vision_model

    @property
    def projector(self) -> tuple[HFModule, ...]:
        """The connector: shuffle and projection."""
        return (self.model.model.connector,)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of a tile in tokens; one token covers several patches of the encoder."""
        (height, width), factor = super().grid, self.config.scale_factor
        return height // factor, width // factor

    def pixels(self, inputs: Mapping[str, Any]) -> list[Float[Tensor, "c h w"]]:
        """As in `VisionAnatomy`: one a tile. Rows with fewer tiles than others are filled up with black ones, which are left out."""
        rows = inputs["pixel_values"]
        return [self._covered(tile) for row in rows for tile in row if bool((tile != 0).any())]

    def encoder_states(self, features: Any) -> Tensor:
        """What the encoder gave for every patch, behind its last norm."""
        return features.last_hidden_state

    def of_tokens(self, values: Tensor, inputs: Mapping[str, Any], fold: Fold) -> Tensor:
        """A token covers the patches that are shuffled into it."""
        return folded(values, self.grid, fold).flatten(0, 1)

    @property
    def token_projector(self) -> HFModule:
        """The projection behind the shuffle."""
        return self.model.model.connector.modality_projection

    def encoder_flops(self) -> int:
        """One tile: patch embedding, all layers, and the projection after the shuffle. Padded patches run too, and count."""
        vision = self.config.vision_config
        (rows, columns), (high, wide) = super().grid, both_sides(vision.patch_size)
        patches, d = rows * columns, vision.hidden_size
        embedding = 2 * patches * d * vision.num_channels * high * wide
        projector = 2 * self.layout().stop * self.text_config.hidden_size * d * self.config.scale_factor**2
        return embedding + vision.num_hidden_layers * transformer_flops(vision, patches) + projector
