"""What the patch benchmark draws and asks: objects that fill one cell each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sparing.lens.patches.geometry import Geometry
from sparing.lens.patches.wording import Wording

PatchGroup = Literal["object", "colour", "count", "character", "conflict"]
GROUPS: tuple[PatchGroup, ...] = get_args(PatchGroup)

RGB = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 220, 50),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}
FINER = 8
"""Shapes are drawn so many times larger and then averaged: smooth edges."""
REACH = 0.46
"""Half the width of a shape, in sides of its cell: it stays inside."""


@dataclass(frozen=True)
class PatchObject:
    """What fills a cell.

    Attributes:
        row: of the cell.
        column: of the cell.
        kind: a shape or a character.
        colour: its colour.
    """

    row: int
    column: int
    kind: str
    colour: str


@dataclass(frozen=True)
class PatchItem:
    """A picture and a question about it.

    Attributes:
        group: `object`: which shape is it? `colour`: which colour has it? `count`: how many are there, each in a cell of its
            own? `character`: which letter or digit is it? `conflict`: which colour has it, before a background of another
            colour? The backgrounds of the other groups are black or white.
        background: its colour.
        objects: what is drawn; several in `count` alone.
        question: what is asked.
        answer: what is right.
        options: what the answer was drawn from: a guess is right once in their number.
        identify: which shape it is, asked of the same picture; `None` where that is the question already.
    """

    group: PatchGroup
    background: str
    objects: tuple[PatchObject, ...]
    question: str
    answer: str
    options: tuple[str, ...]
    identify: str | None

    @property
    def chance(self) -> float:
        """How often a guess is right."""
        return 1 / len(self.options)


def make_items(
    number: int,
    geometry: Geometry,
    wording: Wording,
    *,
    seed: int = 0,
    groups: Sequence[PatchGroup] = GROUPS,
) -> list[PatchItem]:
    """Makes items, groups in turn. The first items of a longer list are those of a shorter one.

    Raises:
        ValueError: no items, no such group, words that cannot be drawn, or fewer cells than the largest count.
    """
    if number < 1:
        raise ValueError(f"items={number}: expected at least 1")
    if not groups or (strange := [group for group in groups if group not in GROUPS]):
        raise ValueError(f"groups={list(groups)}: expected some of {', '.join(GROUPS)}")
    drawn = ("circle", "square", "triangle", "diamond", "cross", "ring")
    if strange := [word for word in wording.objects if word not in drawn]:
        raise ValueError(f"no shape is called {strange[0]!r}: expected some of {', '.join(drawn)}")
    if strange := [word for word in (*wording.colours, *wording.grounds) if word not in RGB]:
        raise ValueError(f"no colour is called {strange[0]!r}: expected some of {', '.join(RGB)}")
    rows, columns = geometry.grid
    if "count" in groups and rows * columns < len(wording.numbers):
        raise ValueError(
            f"a picture of {rows}x{columns} cells has no room for {len(wording.numbers)} objects, one in each: "
            "leave the group count out, or give a wording with fewer numbers"
        )
    return [_item(geometry, wording, groups[place % len(groups)], seed, place) for place in range(number)]


def _item(geometry: Geometry, wording: Wording, group: PatchGroup, seed: int, place: int) -> PatchItem:
    rng = np.random.default_rng([seed, place])

    def pick(words: Sequence[str]) -> str:
        return words[int(rng.integers(len(words)))]

    ground = pick(wording.colours if group == "conflict" else wording.grounds)
    colour = pick([word for word in wording.colours if word != ground])
    kind = pick(wording.characters if group == "character" else wording.objects)
    number = int(rng.integers(len(wording.numbers))) + 1 if group == "count" else 1
    rows, columns = geometry.grid
    cells = sorted(rng.choice(rows * columns, size=number, replace=False).tolist())
    question, answer, options = {
        "object": (wording.ask_object, kind, wording.objects),
        "colour": (wording.ask_colour, colour, wording.colours),
        "count": (wording.ask_count, wording.numbers[number - 1], wording.numbers),
        "character": (wording.ask_character, kind, wording.characters),
        "conflict": (wording.ask_colour, colour, wording.colours),
    }[group]

    def told(text: str) -> str:
        return text.format(colour=colour, object=kind, objects=wording.plural(kind))

    return PatchItem(
        group=group,
        background=ground,
        objects=tuple(PatchObject(cell // columns, cell % columns, kind, colour) for cell in cells),
        question=told(question),
        answer=answer,
        options=options,
        identify=None if group in ("object", "character") else told(wording.ask_object),
    )


def draw(item: PatchItem, geometry: Geometry) -> Image.Image:
    """Draws an item: objects inside their cells, and the bare background everywhere else."""
    height, width = geometry.size
    canvas = Image.new("RGB", (width, height), RGB[item.background])
    for thing in item.objects:
        box = geometry.box(thing.row, thing.column)
        ink = Image.new("RGB", (box[2] - box[0], box[3] - box[1]), RGB[thing.colour])
        canvas.paste(ink, box[:2], _mask(thing.kind, *ink.size))
    return canvas


def contact_sheet(pictures: Sequence[Image.Image], columns: int = 14, side: int = 112) -> Image.Image:
    """All pictures in one, small, to look at."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + 4), rows * (side + 4)), (127, 127, 127))
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        small = picture.resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(small, (column * (side + 4) + 2, row * (side + 4) + 2))
    return sheet


@functools.lru_cache(maxsize=256)
def _mask(kind: str, width: int, height: int) -> Image.Image:
    """How much of each pixel of a cell is covered."""
    large = Image.new("L", (width * FINER, height * FINER), 0)
    pen = ImageDraw.Draw(large)
    x, y, reach = large.width / 2, large.height / 2, min(large.size) * REACH
    left, top, right, bottom = box = (x - reach, y - reach, x + reach, y + reach)
    arm = reach * 0.34
    if kind == "circle":
        pen.ellipse(box, fill=255)
    elif kind == "square":
        pen.rectangle((left + 0.12 * reach, top + 0.12 * reach, right - 0.12 * reach, bottom - 0.12 * reach), fill=255)
    elif kind == "triangle":
        pen.polygon([(x, top), (right, bottom), (left, bottom)], fill=255)
    elif kind == "diamond":
        pen.polygon([(x, top), (right, y), (x, bottom), (left, y)], fill=255)
    elif kind == "cross":
        pen.rectangle((x - arm, top, x + arm, bottom), fill=255)
        pen.rectangle((left, y - arm, right, y + arm), fill=255)
    elif kind == "ring":
        pen.ellipse(box, outline=255, width=round(reach * 0.45))
    else:
        pen.text((x, y), kind.upper(), fill=255, font=_font(round(min(large.size) * 1.16)), anchor="mm")
    return large.resize((width, height), Image.Resampling.BOX)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # The font that comes with matplotlib, so that characters look the same everywhere.
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono-Bold.ttf", size)
