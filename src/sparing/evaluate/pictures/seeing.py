"""Pictures as a vision encoder was shown them, cropped and cut into tiles, and small enough to go into a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

PAGE_SIDE = 448
"""Pixels of the longer side in a page, by default."""
EXACT_PIXELS = 256 * 256
"""Pictures of no more pixels lose nothing."""


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
        return [as_picture(tile, processor) for tile in pixels.flatten(0, -4)]
    return list(pictures) if len(pictures) == spans else [None] * spans


def as_picture(pixels: Float[Tensor, "c h w"], processor: Any) -> Image.Image:
    """Pixels as the processor normalised them, as a picture."""
    settings = processor.image_processor
    found = pixels.detach().float().cpu()
    if getattr(settings, "do_normalize", True):
        mean, std = (torch.tensor(part).reshape(-1, 1, 1) for part in (settings.image_mean, settings.image_std))
        found = found * std + mean
    if getattr(settings, "do_rescale", True):
        found = found / settings.rescale_factor
    return Image.fromarray(found.round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def data_uri(image: Image.Image, longest: int = PAGE_SIDE) -> str:
    """A picture inside a page, its longer side at most so many pixels: small ones to the last bit, others as JPEG."""
    image = image.copy()
    image.thumbnail((longest, longest))
    exact = image.width * image.height <= EXACT_PIXELS
    file = io.BytesIO()
    image.save(file, "PNG" if exact else "JPEG", **({"optimize": True} if exact else {"quality": 86}))
    return f"data:image/{'png' if exact else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"
