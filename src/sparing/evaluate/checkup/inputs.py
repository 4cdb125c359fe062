"""Inputs for a check-up: rows of text in the model's own tokens, and of random pictures where it sees any."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sparing.anatomy import anatomy_of, processed, question_prompt
from sparing.execute.batches import split_rows

TEXT = (
    "The ferry left at six, an hour late, with two cars on its deck and a dog that nobody owned. Anna counted the lights "
    "along the shore until there were none left to count. “How long does it take?” she asked. The captain said that it "
    "takes 40 minutes when the water is calm, and that it is never calm in March. He poured tea into a tin cup, gave it "
    "to her, and went back to the wheel. Far out, a buoy rang twice. She thought of the house, of the key under the third "
    "stone, of the letter that began with her name and ended in the middle of a sentence. Then the rain came. "
)
QUESTIONS = ("What is different between these pictures?", "Describe this picture.", "Which of these comes first?")
COUNTS = (2, 1, 4)
"""Pictures of the rows: two that are compared, and a longer one that is timed."""
LENGTHS = (41, 26, 9)
"""Tokens of the text rows: unlike each other, so that padding is seen at work."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a model is run on.

    Attributes:
        rows: each a batch of one, without padding.
        timed: a longer prompt, alone.
        pictures: whether rows have pictures.
        told: where they come from, in words.
        trouble: why there are no pictures although there is a processor for them; empty where nothing is wrong.
    """

    rows: list[dict[str, Any]]
    timed: dict[str, Any]
    pictures: bool
    told: str
    trouble: str = ""


def inputs_for(model: nn.Module, processor: Any, *, steps: int, seed: int, timed: int) -> Inputs:
    """Make the rows.

    Args:
        model: a Hugging Face model.
        processor: its tokenizer or processor; `None` for random ids.
        steps: how many tokens are decoded after a prompt: room that is left for them.
        seed: of random ids and pixels.
        timed: tokens of the prompt that is timed.
    """
    draw = np.random.default_rng(seed)
    family = anatomy_of(model)
    limit = getattr(family.text_config, "max_position_embeddings", None) or 1 << 20
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = _text_ids(family, tokenizer)
    told = "English text in the model's own tokens"
    if ids is None:
        told = "random token ids (no tokenizer)" if tokenizer is None else "random token ids (it reads no English)"
        ids = _random_ids(family, draw)
    room = max(limit - steps, 2)
    texts = [{"input_ids": ids[:, : min(n, room)]} for n in LENGTHS]
    long = ids.repeat(1, timed // ids.shape[1] + 1)[:, : min(timed, max(limit - 24, 2))]
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    seen, trouble = None, ""
    if family.vision_encoder is not None:
        try:
            made = _picture_rows(model, processor, ids, draw)
            seen = None if made is None else [_ready(model, row, device) for row in made]
        except Exception as error:  # a processor is other people's code, and the checkpoint's settings
            line = " ".join(str(error).split())[:300]
            trouble = f"The processor makes no pictures that the model reads: {type(error).__name__}: {line}"
    rows = [_ready(model, row, device) for row in (texts if seen is None else texts[-1:])]
    rows = [*(seen or [])[:2], *rows]
    if any("mm_token_type_ids" in row for row in rows):
        rows = [{"mm_token_type_ids": torch.zeros_like(row["input_ids"]), **row} for row in rows]
    if seen is not None:
        told = f"two random pictures, one random picture, and text alone ({told})"
    elif family.vision_encoder is not None:
        told += "; without pictures (the checkpoint has no processor to make them)"
    timed_row = _ready(model, {"input_ids": long}, device) if seen is None else _longest(seen, limit - 24)
    return Inputs(rows, timed_row, seen is not None, told, trouble)


def _longest(rows: list[dict[str, Any]], room: int) -> dict[str, Any]:
    """The longest row that fits; the shortest if none does."""
    by_length = sorted(rows, key=lambda row: row["input_ids"].shape[1])
    return next((row for row in reversed(by_length) if row["input_ids"].shape[1] <= room), by_length[0])


def _ready(model: nn.Module, row: dict[str, Any], device: torch.device) -> dict[str, Any]:
    row = {name: value.to(device) for name, value in row.items() if isinstance(value, Tensor)}
    if "pixel_values" in row:
        row["pixel_values"] = row["pixel_values"].to(next(model.parameters()).dtype)
    return split_rows(model, row)[0]


def _text_ids(family: Any, tokenizer: Any) -> Tensor | None:
    """The text's tokens `[1 t]`; `None` where the tokenizer knows too little of it."""
    if tokenizer is None:
        return None
    found = tokenizer(TEXT, return_tensors="pt").input_ids
    unknown = getattr(tokenizer, "unk_token_id", None)
    strange = found == unknown if unknown is not None else torch.zeros_like(found, dtype=torch.bool)
    if found.shape[1] <= max(LENGTHS) or strange.float().mean() > 0.3 or found.max() >= family.text_config.vocab_size:
        return None
    return found


def _random_ids(family: Any, draw: np.random.Generator) -> Tensor:
    """Ids `[1 t]` that mean nothing special: neither padding nor a placeholder of a picture."""
    ids = torch.arange(family.text_config.vocab_size)
    ordinary = torch.ones_like(ids, dtype=torch.bool)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        special = getattr(family.text_config, name, None)
        ordinary[[i for i in (special if isinstance(special, list) else [special]) if i is not None]] = False
    for name, value in vars(family.config).items():
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and 0 <= value < len(ids):
            ordinary[value] = False
    pool = ids[ordinary]
    return pool[torch.from_numpy(draw.integers(0, len(pool), 128))][None]


def _picture_rows(
    model: nn.Module, processor: Any, text: Tensor, draw: np.random.Generator
) -> list[dict[str, Any]] | None:
    """Rows of two pictures, of one, and of four to be timed; `None` where they cannot be made."""
    if getattr(processor, "image_processor", None) is not None:
        return [_processed(processor, question, count, draw) for question, count in zip(QUESTIONS, COUNTS, strict=True)]
    family: Any = anatomy_of(model)
    vision = family.config.vision_config
    try:
        size, tokens = vision.image_size, family.layout().stop
    except (AttributeError, TypeError):
        return None  # a family whose pictures are as large as its processor says
    height, width = (size, size) if isinstance(size, int) else size
    picture = torch.full((1, tokens), family.config.image_token_id)

    def row(*parts: Tensor) -> dict[str, Any]:
        count = sum(part is picture for part in parts)
        pixels = draw.standard_normal((count, getattr(vision, "num_channels", 3), height, width), dtype=np.float32)
        return {"input_ids": torch.cat(parts, dim=1), "pixel_values": torch.from_numpy(pixels)}

    four = [part for i in range(4) for part in (text[:, 4 * i : 4 * i + 4], picture)]
    return [
        row(text[:, :3], picture, text[:, 3:7], picture, text[:, 7:12]),
        row(text[:, :2], picture, text[:, 2:8]),
        row(*four, text[:, 16:24]),
    ]


def _processed(processor: Any, question: str, count: int, draw: np.random.Generator) -> dict[str, Any]:
    """One row from the processor: random pictures and a question."""
    pictures = [
        Image.fromarray(draw.integers(0, 256, (112, 112 + 56 * (i % 2), 3), dtype=np.uint8)) for i in range(count)
    ]
    return dict(processed(processor, [question_prompt(processor, question, count)], [pictures]))
