"""Pictures as a vision encoder was shown them, cropped and cut into tiles, and small enough to go into a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

# Pixels of the longer side in a page. Smaller pictures stay as they are, and losslessly so.
PAGE_SIDE, LOSSLESS_SIDE = 448, 160


def shown(
    processor: Any, row: Mapping[str, Tensor], spans: int, pictures: Sequence[Image.Image]
) -> list[Image.Image | None]:
    """What each span of image tokens shows.

    Where the encoder ran once for each span, that is its own input: a crop, or a tile. Where pictures are spans, however
    often the encoder ran for them, their grids cover whole pictures.

    Args:
        processor: the model's own.
        row: its inputs, a batch of one.
        spans: spans of image tokens.
        pictures: the pictures of the question.

    Returns:
        One a span; `None` where it cannot be told.
    """
    pixels = row.get("pixel_values")
    if pixels is not None and pixels.ndim >= 4 and pixels.shape[:-3].numel() == spans:
        return [_image(tile, processor.image_processor) for tile in pixels.flatten(0, -4).float()]
    return list(pictures) if len(pictures) == spans else [None] * spans


def _image(tile: Tensor, settings: Any) -> Image.Image:
    """Undo the normalisation of `[3 h w]`."""
    if getattr(settings, "do_normalize", False):
        mean, std = (torch.tensor(getattr(settings, name)).view(-1, 1, 1) for name in ("image_mean", "image_std"))
        tile = tile * std + mean
    array = (tile.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(array)


def data_uri(image: Image.Image) -> str:
    """A picture inside a page."""
    small = max(image.size) <= LOSSLESS_SIDE
    if not small:
        image = image.copy()
        image.thumbnail((PAGE_SIDE, PAGE_SIDE))
    file = io.BytesIO()
    image.save(file, "PNG" if small else "JPEG", **({"optimize": True} if small else {"quality": 82}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"
