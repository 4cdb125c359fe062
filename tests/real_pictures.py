"""Pictures for the real-scenes world: the shared folder's, and a small stand-in in the same file formats."""

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image, ImageDraw

DATA = Path(os.environ.get("SPARING_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))

needs_pictures = pytest.mark.skipif(
    not ((DATA / "mnist" / "train.npz").is_file() and (DATA / "cifar10" / "train.parquet").is_file()),
    reason="the shared data folder, or MNIST and CIFAR-10 in it, is absent",
)


def stand_in(folder: Path, digits: int = 1600, photos: int = 1600) -> Path:
    """Writes scribbled digits and noisy gradients as if they were MNIST and CIFAR-10; no two pictures are the same."""
    rng = np.random.default_rng(0)
    labels = np.arange(digits) % 10
    images = np.zeros((digits, 28, 28), dtype=np.uint8)
    for number, label in enumerate(labels):
        canvas = Image.new("L", (28, 28))
        place = tuple(9 + rng.integers(-2, 3, 2))
        ImageDraw.Draw(canvas).text(place, str(label), fill=255, font_size=14)
        noise = rng.integers(0, 160, (28, 28)) * (np.asarray(canvas) > 0)
        images[number] = np.clip(np.asarray(canvas).astype(int) - noise, 0, 255)
    (folder / "mnist").mkdir(parents=True)
    np.savez_compressed(folder / "mnist" / "train.npz", images=images, labels=labels.astype(np.uint8))
    rows = []
    for number in range(photos):
        label = number % 10
        slope = np.linspace(0, 20 * label, 32)[:, None, None] * np.asarray([1.0, 0.5, 0.2])
        pixels = np.clip(slope + rng.normal(90, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG")
        rows.append({"image": data.getvalue(), "label": label})
    (folder / "cifar10").mkdir()
    parquet.write_table(pa.Table.from_pylist(rows), folder / "cifar10" / "train.parquet")
    return folder
