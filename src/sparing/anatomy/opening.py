"""`open_picture`: a picture from a file, as a model's processor can take it, and what was done to it said."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MOST_PIXELS = 100_000_000
"""Pixels that are decoded at most: 300 MB."""
LONGEST, SHORTEST = 4096, 32


@dataclasses.dataclass(frozen=True, eq=False)
class OpenedPicture:
    """A picture, upright and in RGB.

    Attributes:
        name: what to call it.
        image: the pixels.
        notes: what was done to them, each a phrase; empty where nothing was.
    """

    name: str
    image: Image.Image
    notes: tuple[str, ...] = ()


def open_picture(path: str | Path) -> OpenedPicture:
    """Open a picture.

    Transparency is laid on white, a picture with a longer side than 4096 pixels is scaled down (JPEG files while they are
    decoded), and one with a shorter side than 32 is enlarged: many processors refuse those.

    Raises:
        ValueError: no picture, a broken one, one that is too large to decode, or one more than 128 times as long as it is
            wide.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no such picture: {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the pictures in it")
    try:
        with warnings.catch_warnings():
            # Large ones are judged here.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return _opened(image, path)
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{path} is not a picture that can be read: give a PNG, JPEG, WebP, GIF, BMP or TIFF"
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_large(path, "hundreds of millions of pixels") from error
    except (OSError, SyntaxError, EOFError) as error:
        # Pillow's words for a file that ends early, or whose parts contradict each other.
        raise ValueError(f"{path} is broken ({' '.join(str(error).split())}): save it again") from error


def _too_large(path: Path, size: str) -> ValueError:
    return ValueError(f"{path} has {size}, more than can be decoded safely: scale it down to {LONGEST} pixels first")


def _opened(image: Image.Image, path: Path) -> OpenedPicture:
    notes = []
    width, height = image.size
    if max(width, height) > SHORTEST and max(width, height) > LONGEST // SHORTEST * min(width, height):
        raise ValueError(
            f"{path} is {width}×{height} pixels, more than {LONGEST // SHORTEST} times as long as it is wide: cut it into pieces"
        )
    if max(width, height) > LONGEST:
        # JPEG files shrink while they are decoded; for others this does nothing.
        image.draft(image.mode, (LONGEST * width // max(width, height), LONGEST * height // max(width, height)))
    if image.size[0] * image.size[1] > MOST_PIXELS:
        raise _too_large(path, f"{width}×{height} pixels")
    # An MPO is what telephones write: one picture, and small copies of it.
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        notes.append(f"the first of {image.n_frames} frames")  # type: ignore[attr-defined]
    image.load()
    if max(image.size) > LONGEST:
        image.thumbnail((LONGEST, LONGEST), reducing_gap=2.0)
    upright = ImageOps.exif_transpose(image)
    rgb, transparent = _rgb(upright)
    if transparent:
        notes.append("transparency laid on white")
    if max(width, height) > LONGEST:
        notes.append(f"scaled down from {width}×{height} pixels to {rgb.width}×{rgb.height}")
    if min(rgb.size) < SHORTEST:
        factor = -(-SHORTEST // min(rgb.size))
        rgb = rgb.resize((rgb.width * factor, rgb.height * factor), Image.Resampling.NEAREST)
        notes.append(f"enlarged from {width}×{height} pixels to {rgb.width}×{rgb.height}")
    return OpenedPicture(path.name, rgb, tuple(notes))


def _rgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """The picture in RGB on white, and whether any of it was transparent."""
    if image.mode.startswith("I") or image.mode == "F":
        # More than eight bits a pixel, which Pillow would cut off at 255.
        grey = np.asarray(image, dtype=np.float32)
        most = 65535.0 if grey.max() > 255 else 255.0
        return Image.fromarray((grey.clip(0, most) * (255 / most)).astype(np.uint8)).convert("RGB"), False
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB"), False
    layers = image.convert("RGBA")
    least, _ = layers.getchannel("A").getextrema()
    if least == 255:
        return layers.convert("RGB"), False
    ground = Image.new("RGBA", layers.size, "white")
    return Image.alpha_composite(ground, layers).convert("RGB"), True
