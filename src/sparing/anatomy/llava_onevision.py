"""LLaVA-OneVision: a SigLIP encoder over an overview and tiles of any aspect ratio, and any known text decoder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from sparing.anatomy.encoder import Fold
from sparing.anatomy.vision import VisionAnatomy, transformer_flops
from sparing.tokens import ImageSpan


class LlavaOnevisionAnatomy(VisionAnatomy):
    """`LlavaOnevisionForConditionalGeneration`.

    A picture alone in its row is an overview, then the tiles put together, without their padding, with a newline token after each
    row of the grid. Its span's grid is that of the tiles; the overview lies in front (`ImageSpan.offset`). Where a row has several
    pictures (`batch_num_images`) each is an overview alone, with one newline token at its end.
    """

    model_types = ("llava_onevision",)
    picture_sizes = ("image_sizes", "batch_num_images")

    def layouts(self, inputs: Mapping[str, Any]) -> Iterable[ImageSpan]:
        """From `image_sizes`, as the model packs its features.

        Raises:
            ValueError: no `image_sizes`, or not one a picture.
        """
        sizes = inputs.get("image_sizes")
        if sizes is None:
            raise ValueError(
                "image tokens without image_sizes: pass what the processor returned, encode pictures inside apply, and leave "
                "prefill_chunk_size out"
            )
        counts = inputs.get("batch_num_images")
        alone = [True] * len(sizes) if counts is None else [n == 1 for n in counts.tolist() for _ in range(n)]
        if len(alone) != len(sizes):
            raise ValueError(
                f"image_sizes has {len(sizes)} pictures, batch_num_images {len(alone)}: build them with one processor call"
            )
        return self._layouts(sizes.tolist(), alone)

    def _layouts(self, sizes: list[list[int]], alone: list[bool]) -> Iterator[ImageSpan]:
        for size, tiled in zip(sizes, alone, strict=True):
            yield self._tiled(size) if tiled else self._overview()

    def _overview(self) -> ImageSpan:
        height, width = self.grid
        return ImageSpan(0, height * width + 1, self.grid)

    def _tiled(self, size: list[int]) -> ImageSpan:
        """The overview and the tiles of a picture of `size` (height, width) pixels."""
        side, _ = self.grid
        down, across, above, before = self._padding(size)
        height, width = side * down - 2 * above, side * across - 2 * before
        most = int(self.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(height * width / (most * side**2))
        if ratio > 1.1:
            height, width = int(height // ratio), int(width // ratio)
        overview = side * side
        stop = overview + height * (width + 1)
        return ImageSpan(0, stop, (height, width), offset=overview, stride=width + 1, tiles=1 + down * across)

    def _padding(self, size: list[int]) -> tuple[int, int, int, int]:
        """Tiles down and across, and the tokens of padding above (and below) and before (and behind) a picture of `size` pixels."""
        side, _ = self.grid
        tile = self.config.vision_config.image_size
        best_height, best_width = select_best_resolution(tuple(size), self.config.image_grid_pinpoints)
        down, across = best_height // tile, best_width // tile
        height, width = side * down, side * across
        # The same rounding as transformers' `unpad_image`.
        if size[1] / size[0] > width / height:
            return down, across, (height - int(round(size[0] * (width / size[1]), 7))) // 2, 0
        return down, across, 0, (width - int(round(size[1] * (height / size[0]), 7))) // 2

    def pixels(self, inputs: Mapping[str, Any]) -> list[Float[Tensor, "c h w"]]:
        """As in `VisionAnatomy`: the tiles put together, or the overview where there are no tiles."""
        (side, _), found = self.grid, []
        layouts = self.layouts(inputs)
        for size, layout, tiles in zip(inputs["image_sizes"].tolist(), layouts, inputs["pixel_values"], strict=True):
            tiles = self._covered(tiles)
            if not layout.offset:
                found.append(tiles[0])
                continue
            down, across, above, before = self._padding(size)
            _, channels, height, width = tiles.shape
            whole = tiles[1 : 1 + down * across].unflatten(0, (down, across)).permute(2, 0, 3, 1, 4)
            whole = whole.reshape(channels, down * height, across * width)
            high, wide = height // side * above, width // side * before
            found.append(whole[:, high : down * height - high, wide : across * width - wide])
        return found

    def overviews(self, inputs: Mapping[str, Any]) -> list[Float[Tensor, "c h w"] | None]:
        """As in `VisionAnatomy`: the first tile, where there are others."""
        layouts = self.layouts(inputs)
        return [
            self._covered(tiles[0]) if layout.offset else None
            for layout, tiles in zip(layouts, inputs["pixel_values"], strict=True)
        ]

    def of_tokens(self, values: Tensor, inputs: Mapping[str, Any], fold: Fold) -> Tensor:
        """Packed as the model packs the features themselves: unpadded, scaled down, and a newline (NaN) after each row."""
        return self._packed(self.read_positions(values), inputs)

    def behind_tokens(self, read: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """As in `EncoderAnatomy`. Very large pictures are scaled down behind the projector: there it is the mean of what it read."""
        return self._packed(read, inputs)

    def _packed(self, values: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """`[tiles patches c]` -> `[n c]`."""
        sizes, counts = inputs["image_sizes"], inputs.get("batch_num_images")
        alone = [True] * len(sizes) if counts is None else [n == 1 for n in counts.tolist() for _ in range(n)]
        tiles = [
            image_size_to_num_patches(size, self.config.image_grid_pinpoints, self.config.vision_config.image_size)
            if one
            else 1
            for size, one in zip(sizes, alone, strict=True)
        ]
        packed, _ = self.model.model.pack_image_features(
            values.split(tiles),
            sizes,
            image_newline=values.new_full((values.shape[-1],), math.nan),
            vision_aspect_ratio=self.config.vision_aspect_ratio,
        )
        return torch.cat(packed)

    def encoder_flops(self) -> int:
        """One tile: patch embedding, all layers, and the projector. Not counted: the scaling down of very large pictures."""
        vision = self.config.vision_config
        height, width = self.grid
        n, d, out = height * width, vision.hidden_size, self.text_config.hidden_size
        feature_layers = self.config.vision_feature_layer
        width_in = d * (len(feature_layers) if isinstance(feature_layers, list) else 1)
        embedding = 2 * n * d * vision.num_channels * vision.patch_size**2
        return embedding + vision.num_hidden_layers * transformer_flops(vision, n) + 2 * n * out * (width_in + out)
