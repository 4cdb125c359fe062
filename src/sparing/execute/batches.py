"""Take a processor's batch apart into rows, and put rows together again with padding on either side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparing.anatomy import anatomy_of
from sparing.tokens import TokenMap

ROWS = ("input_ids", "attention_mask", "mm_token_type_ids")
"""Inputs `[b t]`, beside the positions."""
COUNTS = ("batch_num_images",)
"""Inputs with one entry a row."""
PICTURES = ("pixel_values", "pixel_attention_mask", "image_grid_thw", "image_sizes")
"""Inputs that have one entry (or, for flattened patches, one stretch) a picture."""


def split_rows(model: nn.Module, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each row of a batch as a batch of its own, without padding.

    Raises:
        ValueError: no ids, or an input that cannot be told apart by rows.
    """
    if "input_ids" not in inputs:
        raise ValueError("the inputs have no input_ids: pass what the tokenizer or processor returned")
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    unknown = set(inputs) - {*ROWS, "position_ids", *COUNTS, *PICTURES}
    if unknown:
        raise ValueError(f"cannot split {sorted(unknown)} into rows: pass ids, mask and pictures alone")
    tokens = TokenMap.from_inputs(model, inputs)
    counts = [len(row) for row in tokens.images]
    pictures = _by_row(inputs, counts)
    rows = []
    for r, keep in enumerate(mask.bool()):
        row = {"input_ids": ids[r : r + 1, keep], "attention_mask": mask[r : r + 1, keep]}
        if "mm_token_type_ids" in inputs:
            row["mm_token_type_ids"] = inputs["mm_token_type_ids"][r : r + 1, keep]
        # Processors leave rows without pictures out of the counts.
        row |= {name: inputs[name].new_tensor([counts[r]]) for name in COUNTS if name in inputs}
        if tokens.position_ids.ndim == 2:
            row["position_ids"] = torch.arange(int(keep.sum()), device=ids.device).unsqueeze(0)
        rows.append({**row, **(pictures[r] if counts[r] else {})})
    return rows


def _by_row(inputs: Mapping[str, Any], counts: list[int]) -> list[dict[str, Any]]:
    """The pictures of each row."""
    found: list[dict[str, Any]] = [{} for _ in counts]
    for name in PICTURES:
        if name not in inputs:
            continue
        value: Tensor = inputs[name]
        if _by_rows(inputs, name):
            for row, part, count in zip(found, value, counts, strict=True):
                row[name] = part[None, :count]
            continue
        sizes = counts
        grid = inputs.get("image_grid_thw")
        if name == "pixel_values" and grid is not None:
            sizes = [int(part.prod(-1).sum()) for part in grid.split(counts)]
        if sum(sizes) != len(value):
            raise ValueError(
                f"{name} has {len(value)} entries for {sum(sizes)} in the text: build them with one processor call"
            )
        for row, part in zip(found, value.split(sizes), strict=True):
            row[name] = part
    return found


def _by_rows(inputs: Mapping[str, Any], name: str) -> bool:
    """Whether pictures are `[b n c h w]` (masks of theirs `[b n h w]`), filled up with zeros, and not `[n tiles c h w]`."""
    filled = "pixel_values" in inputs and inputs["pixel_values"].ndim == 5 and "image_sizes" not in inputs
    return filled and name in ("pixel_values", "pixel_attention_mask")


def pad_rows(model: nn.Module, rows: Sequence[Mapping[str, Any]], side: str) -> dict[str, Any]:
    """Put rows of `split_rows` into one batch, padded on `left` or `right`."""
    length = max(row["input_ids"].shape[1] for row in rows)
    filling = {"input_ids": anatomy_of(model).text_config.pad_token_id or 0}
    batch: dict[str, Any] = {}
    known: dict[str, Any] = {name: value for row in rows for name, value in row.items()}
    for name in known:
        if name in COUNTS:
            batch[name] = torch.cat([row[name] for row in rows if name in row])
        elif name not in PICTURES:
            batch[name] = torch.cat([_pad(row[name], length, side, filling.get(name, 0)) for row in rows])
    for name in PICTURES:
        parts = [row[name] for row in rows if name in row]
        if parts and _by_rows(known, name):
            batch[name] = _fill_up([row.get(name) for row in rows], parts)
        elif parts and parts[0].ndim == 5:
            # Tiles `[n tiles c h w]`, as many as the picture of the row with the most has.
            most = max(part.shape[1] for part in parts)
            batch[name] = torch.cat(
                [nn.functional.pad(part, (0, 0, 0, 0, 0, 0, 0, most - part.shape[1])) for part in parts]
            )
        elif parts:
            batch[name] = torch.cat(parts)
    return batch


def _fill_up(pictures: Sequence[Tensor | None], parts: Sequence[Tensor]) -> Tensor:
    """`[1 n c h w]` of each row -> `[b n c h w]`, zeros where a row has fewer pictures."""
    batch = parts[0].new_zeros(len(pictures), max(part.shape[1] for part in parts), *parts[0].shape[2:])
    for row, part in zip(batch, pictures, strict=True):
        if part is not None:
            row[: part.shape[1]] = part[0]
    return batch


def _pad(row: Tensor, length: int, side: str, value: int) -> Tensor:
    missing = length - row.shape[1]
    return nn.functional.pad(row, (missing, 0) if side == "left" else (0, missing), value=value)
