"""Real pictures from a data folder: handwritten digits (MNIST) and photographs (CIFAR-10), split by which picture it is."""

import functools
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
from PIL import Image

from sparing.worlds.real_scenes.words import CLASSES, DIGITS
from sparing.worlds.splits import Split, split_of

DIGITS_FILE = "mnist/train.npz"
PHOTOS_FILE = "cifar10/train.parquet"
# Digits lie within the middle 24 of the 28 pixels: the outer rim would only make them smaller.
RIM = 2


@dataclass(frozen=True, eq=False)
class Gallery:
    """Pictures to make scenes of. A picture is named by its place in its file, which also decides its split.

    Attributes:
        digits: `[n 28 28]` uint8, ink is 255.
        digit_labels: `[n]`, 0 to 9.
        photos: `[m 32 32 3]` uint8.
        photo_labels: `[m]`, places in `CLASSES`.
    """

    digits: np.ndarray
    digit_labels: np.ndarray
    photos: np.ndarray
    photo_labels: np.ndarray

    @classmethod
    def open(cls, folder: Path | str) -> "Gallery":
        """Reads the two files of a data folder.

        - `mnist/train.npz`: `images` uint8 `[n 28 28]`, `labels` 0 to 9.
        - `cifar10/train.parquet`: columns `image` (the bytes of a 32x32 JPEG or PNG) and `label`, 0 to 9.

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: a file holds something else, or there is no picture of some kind in some split.
        """
        digits_file, photos_file = (Path(folder) / name for name in (DIGITS_FILE, PHOTOS_FILE))
        missing = [str(file) for file in (digits_file, photos_file) if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"expected MNIST in {digits_file} (images uint8 [n 28 28], labels) and CIFAR-10 in {photos_file} (columns "
                f"image, label), but {' and '.join(missing)} cannot be found: name the folder that holds both"
            )
        with np.load(digits_file, allow_pickle=False) as file:
            lacking = {"images", "labels"} - set(file.files)
            if lacking:
                raise ValueError(f"expected arrays images and labels in {digits_file}, got {', '.join(file.files)}")
            digits, digit_labels = file["images"], file["labels"].astype(np.int64)
        table = parquet.read_table(photos_file)
        if not {"image", "label"} <= set(table.column_names):
            raise ValueError(f"expected columns image and label in {photos_file}, got {', '.join(table.column_names)}")
        decoded = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in table["image"].to_pylist()]
        shapes = {image.shape for image in decoded}
        if digits.ndim != 3 or digits.shape[1:] != (28, 28) or shapes != {(32, 32, 3)}:
            raise ValueError(
                f"expected digits of 28x28 and photographs of 32x32 pixels, got {digits.shape[1:]} and {sorted(shapes)}"
            )
        return cls(digits, digit_labels, np.stack(decoded), np.asarray(table["label"].to_pylist(), dtype=np.int64))

    def __post_init__(self) -> None:
        """Refuse a gallery that lacks a kind of picture in a split."""
        for split in ("train", "validation", "test"):
            lacking = [kind for kind in (*DIGITS, *CLASSES) if not len(self.of(kind, split))]
            if lacking:
                raise ValueError(f"expected pictures of every kind in the {split} split, got no {', '.join(lacking)}")

    def of(self, kind: str, split: Split | None = None) -> np.ndarray:
        """The places of the pictures of a kind in their file: those of a split, or all of them."""
        return self._places[kind, split]

    @functools.cached_property
    def _places(self) -> dict[tuple[str, Split | None], np.ndarray]:
        found: dict[tuple[str, Split | None], np.ndarray] = {}
        for name, labels, kinds in (("digit", self.digit_labels, DIGITS), ("photo", self.photo_labels, CLASSES)):
            splits = np.asarray([split_of(f"{name} {place}") for place in range(len(labels))])
            for number, kind in enumerate(kinds):
                found[kind, None] = np.flatnonzero(labels == number)
                for split in ("train", "validation", "test"):
                    found[kind, split] = np.flatnonzero((labels == number) & (splits == split))
        return found

    @functools.lru_cache(maxsize=4)  # noqa: B019 - a gallery lives as long as its process
    def digit_masks(self, side: int) -> np.ndarray:
        """Every digit as the coverage of a patch's pixels by ink, `[n side side]` uint8."""
        return _resized(self.digits[:, RIM:-RIM, RIM:-RIM, None], side)[..., 0]

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def photo_patches(self, side: int) -> np.ndarray:
        """Every photograph scaled to a patch, `[m side side 3]` uint8."""
        return _resized(self.photos, side)


def _resized(images: np.ndarray, side: int) -> np.ndarray:
    """Scales square pictures `[n s s c]` to `side` by averaging areas."""
    weights = _areas(images.shape[1], side)
    parts = []
    for first in range(0, len(images), 4096):
        part = images[first : first + 4096].astype(np.float32)
        scaled = np.einsum("ph,nhwc,qw->npqc", weights, part, weights, optimize=True)
        parts.append(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))
    return np.concatenate(parts)


def _areas(old: int, new: int) -> np.ndarray:
    """Which share of each new pixel each old one covers, along one side: `[new old]`, rows sum to one."""
    edges = np.arange(new + 1) * old / new
    first, last = edges[:-1, None], edges[1:, None]
    pixels = np.arange(old)
    shared = np.minimum(last, pixels + 1) - np.maximum(first, pixels)
    return (np.clip(shared, 0, None) * new / old).astype(np.float32)
