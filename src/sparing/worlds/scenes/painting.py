"""Pictures of scenes: anti-aliased, a few thousand a second, every object inside its patch."""

import functools
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sparing.worlds.grids.words import COLOURS
from sparing.worlds.scenes.scene import Scene
from sparing.worlds.scenes.words import KINDS, SHAPES

SUPERSAMPLING = 8
SIZES = (0.82, 0.91, 1.0)
OFFSETS = (-0.04, 0.0, 0.04)
# Half the width of the largest mask at its largest offset stays inside the patch.
REACH = 0.5 - max(OFFSETS)


def paint(scenes: Sequence[Scene]) -> np.ndarray:
    """Paints scenes of one spec.

    A picture follows from its scene alone, `Scene.look` included.

    Returns:
        `[n height width 3]` uint8.
    """
    spec = scenes[0].spec
    masks = _masks(spec.patch)
    shape = (len(scenes), spec.rows, spec.columns, spec.patch, spec.patch, 3)
    canvas = np.empty(shape, dtype=np.float32)
    for number, scene in enumerate(scenes):
        if scene.spec != spec:
            raise ValueError("expected scenes of one spec, got several: paint them apart")
        rng = np.random.default_rng(scene.look)
        off = rng.integers(-spec.colour_noise, spec.colour_noise + 1, size=(len(scene.things) + 1, 3))
        variant = rng.integers(masks.shape[1], size=len(scene.things))
        ground = np.asarray(COLOURS[scene.background]) + off[-1]
        canvas[number] = ground
        for place, thing in enumerate(scene.things):
            mask = masks[KINDS.index(thing.kind), variant[place], :, :, None]
            ink = np.asarray(COLOURS[thing.colour]) + off[place]
            canvas[number, thing.row, thing.column] = ground * (1 - mask) + ink * mask
        if spec.pixel_noise:
            canvas[number] += rng.standard_normal(shape[1:], dtype=np.float32) * spec.pixel_noise
    flat = canvas.transpose(0, 1, 3, 2, 4, 5).reshape(len(scenes), *spec.size, 3)
    return np.clip(np.rint(flat), 0, 255).astype(np.uint8)


def picture(scene: Scene) -> Image.Image:
    """Paints one scene, as the picture that a processor takes."""
    return Image.fromarray(paint([scene])[0])


@functools.cache
def _masks(patch: int) -> np.ndarray:
    """Coverage of a patch's pixels, `[kinds variants patch patch]` in 0 to 1."""
    masks = np.zeros((len(KINDS), len(SIZES) * len(OFFSETS) ** 2, patch, patch), dtype=np.float32)
    for number, kind in enumerate(KINDS[1:], start=1):
        looks = [(size, x, y) for size in SIZES for x in OFFSETS for y in OFFSETS]
        for place, (size, x, y) in enumerate(looks):
            masks[number, place] = _mask(kind, patch, size, x, y)
    return masks


def _mask(kind: str, patch: int, size: float, x: float, y: float) -> np.ndarray:
    side = patch * SUPERSAMPLING
    large = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(large)
    cx, cy, reach = side * (0.5 + x), side * (0.5 + y), side * REACH * size
    box = [cx - reach, cy - reach, cx + reach, cy + reach]
    left, top, right, bottom = box
    if kind == "circle":
        draw.ellipse(box, fill=255)
    elif kind == "square":
        shrink = reach * 0.12
        draw.rectangle([left + shrink, top + shrink, right - shrink, bottom - shrink], fill=255)
    elif kind == "triangle":
        draw.polygon([(cx, top), (right, bottom), (left, bottom)], fill=255)
    elif kind == "diamond":
        draw.polygon([(cx, top), (right, cy), (cx, bottom), (left, cy)], fill=255)
    elif kind == "cross":
        arm = reach * 0.34
        draw.rectangle([cx - arm, top, cx + arm, bottom], fill=255)
        draw.rectangle([left, cy - arm, right, cy + arm], fill=255)
    elif kind == "ring":
        draw.ellipse(box, outline=255, width=round(reach * 0.45))
    else:
        draw.text((cx, cy), kind.upper(), fill=255, font=_font(patch, size), anchor="mm")
    assert kind in SHAPES or len(kind) == 1
    coverage = np.asarray(large, dtype=np.float32) / 255
    return coverage.reshape(patch, SUPERSAMPLING, patch, SUPERSAMPLING).mean((1, 3))


@functools.cache
def _font(patch: int, size: float) -> ImageFont.FreeTypeFont:
    # The font that comes with matplotlib, so that letters look the same everywhere.
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono-Bold.ttf"
    return ImageFont.truetype(str(path), size=round(patch * SUPERSAMPLING * 1.16 * size))
