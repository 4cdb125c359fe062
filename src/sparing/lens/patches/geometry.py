"""Which pixels of a picture one visual token is made of, found through the model's own processor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor, nn

from sparing.anatomy import anatomy_of, ask
from sparing.anatomy.vision import both_sides
from sparing.tokens import ImageSpan, TokenMap

LARGEST = 8
"""Sides of the encoder that a picture may have, where its processor scales smaller ones up (SmolVLM)."""
QUESTION = "What is it?"


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Pictures of one size that a processor hands to the encoder pixel by pixel, and the cells that its tokens cover.

    A cell is a rectangle of the picture whose pixels are all that goes into one token's patches, and into no other token of
    the same view. Where a model also sees a scaled-down view of the whole picture (SmolVLM's overview), that view's tokens show
    the cell too, small and with its neighbours. Where two views are the same size (LLaVA-OneVision's overview and its only
    tile), a cell has one token in each.

    Attributes:
        size: height and width of the pictures, in pixels.
        cell: height and width of a cell.
        overviews: tiles that show the whole picture scaled down.
    """

    size: tuple[int, int]
    cell: tuple[int, int]
    overviews: tuple[int, ...] = ()

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of cells."""
        return self.size[0] // self.cell[0], self.size[1] // self.cell[1]

    def box(self, row: int, column: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of a cell."""
        height, width = self.cell
        return column * width, row * height, (column + 1) * width, (row + 1) * height


class View:
    """A picture as a model's encoder gets it.

    Attributes:
        inputs: what the processor made of it and a question.
        tokens: their map.
        pixels: `[tiles h w p]`, what each token is made of.
    """

    def __init__(self, model: nn.Module, processor: Any, picture: Image.Image) -> None:
        anatomy: Any = anatomy_of(model)
        self.inputs = ask(model, processor, [QUESTION], [[picture]])
        self.tokens = TokenMap.from_inputs(model, self.inputs)
        self.pixels: Tensor = anatomy.token_pixels(self.inputs)

    def changed(self, other: View) -> Bool[Tensor, "tiles h w"]:
        """Tokens that another picture of the same size gives other pixels.

        Raises:
            ValueError: the other picture was cut into other tiles.
        """
        if self.pixels.shape != other.pixels.shape:
            raise ValueError("pictures of one size were cut into different tiles: their content must not decide")
        return (self.pixels != other.pixels).any(-1)

    def places(self, where: Bool[Tensor, "tiles h w"]) -> list[int]:
        """The original indices of some of the tokens."""
        tiles, height, width = where.shape
        spans = self.tokens.images[0]
        if len(spans) == tiles:
            found = torch.stack([span.patches() for span in spans])
        elif len(spans) == 1 and _twice(spans[0], tiles, height, width):
            overview = spans[0].start + torch.arange(height * width).view(height, width)
            found = torch.stack([overview, spans[0].patches()])
        else:
            raise ValueError(f"{tiles} tiles of {height}x{width} tokens do not lie in {len(spans)} pictures one by one")
        if found.shape != where.shape:
            raise ValueError(f"a token map of {tuple(found.shape)} tokens for pixels of {tuple(where.shape)}")
        return found[where.cpu()].tolist()


def find_geometry(model: nn.Module, processor: Any) -> Geometry:
    """Finds the smallest picture of the encoder's shape that its processor neither scales nor cuts within a cell.

    Nothing about the processor is assumed: pixels are changed in some cells, and which tokens' pixels change is looked at.

    Raises:
        ValueError: a model or processor without pictures, or no such size; it says what came of the last one tried.
    """
    anatomy: Any = anatomy_of(model)
    if anatomy.vision_encoder is None:
        raise ValueError(f"{anatomy.config.model_type} reads text alone: choose a vision-language model")
    # A model without a processor for pictures is refused here, with the cure, and not as a size that does not fit.
    ask(model, processor, [QUESTION], [[Image.new("RGB", (64, 64))]])
    tried, why = [], ""
    for size in _sizes(anatomy):
        tried.append("{1}x{0}".format(*size))
        try:
            return _checked(model, processor, size, anatomy.cell)
        except ValueError as error:
            why = str(error)
    raise ValueError(
        f"no picture size gives every token pixels of its own (tried {', '.join(tried)}; the last one: {why}): "
        "does the processor belong to this model?"
    )


def _sizes(anatomy: Any) -> Iterator[tuple[int, int]]:
    image = getattr(anatomy.config.vision_config, "image_size", None)
    if image is None:
        # Pictures of any size, up to a limit that the processor knows.
        height, width = anatomy.cell
        yield from ((cells * height, cells * width) for cells in range(anatomy.grid[0], 1, -1))
    else:
        tall, wide = both_sides(image)
        yield from ((times * tall, times * wide) for times in range(1, LARGEST + 1))


def _checked(model: nn.Module, processor: Any, size: tuple[int, int], cell: tuple[int, int]) -> Geometry:
    """The geometry of pictures of a size.

    Raises:
        ValueError: they are scaled, or cells and tokens do not lie on each other.
    """
    plain = Image.new("RGB", (size[1], size[0]), (127, 127, 127))
    base = View(model, processor, plain)
    geometry = Geometry(size, cell)
    rows, columns = geometry.grid
    probes = sorted(
        {
            (row, column)
            for row, column in ((0, 0), (0, 1), (1, 0), (1, 1), (rows // 2, columns // 2), (rows - 1, columns - 1))
            if row < rows and column < columns
        }
    )
    noise = np.random.default_rng(0).integers(0, 256, (*cell, 3), dtype=np.uint8)
    changes = []
    for row, column in probes:
        probe = plain.copy()
        probe.paste(Image.fromarray(noise), geometry.box(row, column)[:2])
        changes.append(base.changed(View(model, processor, probe)))
    found = torch.stack(changes)
    tiles = found.any((2, 3))
    everywhere = tiles.all(0)
    # A tile that every probe changes shows the whole picture; where others show its parts, it is an overview.
    overviews = everywhere if bool((tiles & ~everywhere).any()) else torch.zeros_like(everywhere)
    own = found[:, ~overviews]
    if bool((own.sum((2, 3)) > 1).any()) or not bool(own.any((1, 2, 3)).all()):
        raise ValueError("the pixels of one cell reach several tokens, or none")
    if len(own.flatten(1).int().unique(dim=0)) < len(probes):
        raise ValueError("several cells are in one token")
    base.places(found[0])
    return Geometry(size, cell, tuple(overviews.nonzero().flatten().tolist()))


def _twice(span: ImageSpan, tiles: int, height: int, width: int) -> bool:
    return span.tiles == tiles == 2 and span.offset == height * width and span.grid == (height, width)
