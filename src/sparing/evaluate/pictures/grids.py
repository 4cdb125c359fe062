"""The grids of visual tokens, with what the vision encoder was given under each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL.Image import Image
from torch import Tensor, nn

from sparing.anatomy import anatomy_of, ask
from sparing.evaluate.pictures.files import OpenedPicture
from sparing.evaluate.pictures.seeing import as_picture
from sparing.lens import WordReading
from sparing.tokens import ImageSpan, TokenMap


@dataclasses.dataclass(frozen=True, eq=False)
class SeenPicture:
    """One grid of visual tokens: a picture, or a tile of one.

    Attributes:
        name: of the picture, and which part of it this is.
        image: what the encoder was given of it, the grid evenly over it.
        original: the picture before the processor; the same for all parts of one picture.
        places: `[height width]`, which of the `n` tokens each cell of the grid is.
        extra: tokens of it that are no cell of the grid: which of the `n`, and what it is.
        notes: what was done to the picture before.
    """

    name: str
    image: Image
    original: Image
    places: Int[np.ndarray, "h w"]
    extra: tuple[tuple[int, str], ...] = ()
    notes: tuple[str, ...] = ()


def grids_of(
    model: nn.Module,
    processor: Any,
    inputs: dict[str, Tensor],
    tokens: TokenMap,
    reading: WordReading,
    pictures: Sequence[OpenedPicture],
    question: str,
) -> Iterator[SeenPicture]:
    """Each picture, tile and overview with its grid, as the encoder saw it.

    Args:
        model: a Hugging Face vision-language model of a known family.
        processor: its processor.
        inputs: a prompt of one row.
        tokens: its map.
        reading: of all its visual tokens.
        pictures: what it was made of.
        question: what it was made of.

    Raises:
        ValueError: it cannot be told which tile is of which picture.
    """
    anatomy: Any = anatomy_of(model)
    spans = tokens.images[0]
    owners = _owners(model, processor, pictures, question, len(spans))
    at = {int(place): i for i, place in enumerate(reading.index[:, 1].tolist())}
    pixels, overviews = anatomy.pixels(inputs), anatomy.overviews(inputs)
    for i, (span, owner, seen, overview) in enumerate(zip(spans, owners, pixels, overviews, strict=True)):
        picture, siblings = pictures[owner], [j for j, other in enumerate(owners) if other == owner]
        part = f" · part {siblings.index(i) + 1} of {len(siblings)}" if len(siblings) > 1 else ""
        places, before = reading.of(span, 0).numpy(), range(span.start, span.start + span.offset)
        on_grid = set(span.patches().flatten().tolist())
        rest = [place for place in range(span.start, span.stop) if place not in on_grid]
        if overview is not None:
            shape = anatomy.grid
            lain = np.array([at[place] for place in before]).reshape(shape)
            yield SeenPicture(
                f"{picture.name} · overview", as_picture(overview, processor), picture.image, lain, (), picture.notes
            )
            rest = [place for place in rest if place not in before]
        extra = tuple((at[place], _beside(span, place, n)) for n, place in enumerate(rest))
        yield SeenPicture(
            f"{picture.name}{part}", as_picture(seen, processor), picture.image, places, extra, picture.notes
        )


def _beside(span: ImageSpan, place: int, n: int) -> str:
    """What a token is that is no patch."""
    if place < span.start + span.offset:
        return "class token" if span.offset == 1 else f"in front {n + 1}"
    if not span.stride:
        return "newline"
    return f"newline {(place - span.start - span.offset) // span.stride + 1}"


def _owners(
    model: nn.Module, processor: Any, pictures: Sequence[OpenedPicture], question: str, spans: int
) -> list[int]:
    """Which picture each span is of: some families cut pictures into tiles, and their inputs do not say which are whose."""
    if spans == len(pictures):
        return list(range(spans))
    if len(pictures) == 1:
        return [0] * spans
    owners: list[int] = []
    for i, picture in enumerate(pictures):
        alone = TokenMap.from_inputs(model, ask(model, processor, [question], [[picture.image]]))
        owners += [i] * len(alone.images[0])
    if len(owners) != spans:
        raise ValueError(
            f"the processor makes {spans} tiles of these {len(pictures)} pictures together and {len(owners)} of each alone: look at "
            "one picture at a time"
        )
    return owners
