"""`EncoderAnatomy`: what happens inside a vision encoder's layers, and which of its patches lie behind which image token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from sparing.anatomy.base import Anatomy, HFModule

Fold = Literal["mean", "max"]
"""What a token that covers several patches has of them."""
EncoderLayer = int | float | None
"""A layer of the encoder: its number (negative from the end), a share of its depth, or the one whose output is projected."""


class EncoderAnatomy(Anatomy):
    """The parts of the encoder. The defaults are those of a transformer over tiles of one size (CLIP, SigLIP).

    "Positions" are what goes through the encoder's layers: `[tiles positions d]`, a class token in front where there is one.
    """

    class_token: bool = False
    """Whether the first position of a tile is a class token."""

    @property
    def encoder_attentions(self) -> Sequence[HFModule]:
        """The attention modules of the encoder's layers."""
        encoder: Any = self.vision_encoder
        encoder = getattr(getattr(encoder, "vision_model", encoder), "encoder", None)
        return [layer.self_attn for layer in getattr(encoder, "layers", ()) if hasattr(layer, "self_attn")]

    @property
    def projected_layer(self) -> int:
        """The layer whose output is projected (the last of them, where there are several)."""
        read = getattr(self.config, "vision_feature_layer", -1)
        read = read if isinstance(read, int) else read[-1]
        # Hidden states begin with the embeddings, which no layer gave.
        return read % (len(self.encoder_attentions) + 1) - 1

    def encoder_layer(self, which: EncoderLayer) -> int:
        """The number of a layer of the encoder.

        Raises:
            ValueError: the family cannot tell, or there is no such layer.
        """
        depth = len(self.encoder_attentions)
        if not depth:
            raise ValueError(
                f"the adapter of {self.config.model_type} does not say what the vision encoder's layers attend to: use a method "
                "that looks at tokens (DivPrune, CDPruner) or into the decoder (FastV, DART), or add `encoder_attentions` to it"
            )
        layer = which
        if which is None:
            layer = self.projected_layer
        elif isinstance(which, float):
            layer = max(round(which * depth) - 1, 0)
        if not isinstance(layer, int) or not -depth <= layer < depth:
            raise ValueError(f"the vision encoder has layers 0..{depth - 1} (or -{depth}..-1), no layer {which}")
        return layer % depth

    def encoder_query_key(self, layer: int, asking: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled queries and keys `[... heads head_dim]` of what enters a layer's attention, `[... d]`, not yet rotated."""
        attention = self.encoder_attentions[layer]
        query = attention.q_proj(asking).unflatten(-1, (-1, attention.head_dim))
        return query * attention.scale, attention.k_proj(asked).unflatten(-1, (-1, attention.head_dim))

    def encoder_rotate(self, layer: int, x: Tensor, given: Mapping[str, Any]) -> Tensor:
        """Rotary embedding of queries or keys, where the encoder has one. `given`: what its attention was called with."""
        return x

    def encoder_lengths(self, given: Mapping[str, Any]) -> list[int] | None:
        """How many positions see each other, one stretch after another; `None` where each tile is a row of its own."""
        return None

    def of_tokens(self, values: Tensor, inputs: Mapping[str, Any], fold: Fold) -> Tensor:
        """What patches have, for the image tokens of a batch in order: `[tiles positions c]` -> `[n c]`, NaN in newlines.

        Args:
            values: something of every position, the class token's in front.
            inputs: what the model was called with.
            fold: what a token that covers several patches has.
        """
        return self.read_positions(values).flatten(0, 1)

    def read_positions(self, values: Tensor) -> Tensor:
        """The positions that are projected: without the class token, where the config leaves it out."""
        return values[:, 1:] if getattr(self.config, "vision_feature_select_strategy", "full") == "default" else values

    # From the encoder to the token -----------------------------------------------------------------------------------

    @property
    def token_projector(self) -> HFModule:
        """The module that makes of what lies behind a token the token, each alone."""
        return self.projector[0]

    def behind_tokens(self, read: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """What `token_projector` read, for the image tokens of a batch in order: -> `[n c]`, NaN in newlines."""
        return read.flatten(0, -2)

    def project_tokens(self, behind: Tensor) -> Tensor:
        """What `token_projector` makes of it: `[n c]` -> `[n d]`."""
        return self.token_projector(behind)


def folded(values: Tensor, grid: tuple[int, int], fold: Fold) -> Tensor:
    """`[tiles patches c]`, square tiles of patches, to what each token of a `grid` has of its patches, `[tiles tokens c]`."""
    side = math.isqrt(values.shape[1])
    tiles = values.unflatten(1, (grid[0], side // grid[0], grid[1], side // grid[1]))
    return (tiles.mean((2, 4)) if fold == "mean" else tiles.amax((2, 4))).flatten(1, 2)
