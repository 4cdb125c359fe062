"""`TokenMap`: what each token of a batch is. Batched, padded left or right, any number of images."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Group(enum.IntEnum):
    """What a token is. One group a token; padding is a group so that nothing needs a second mask."""

    PAD = 0
    TEXT = 1
    IMAGE = 2
    SYSTEM = 3  # the text before the first image of a row (the papers' "system tokens")
    SOURCE = 4
    TARGET = 5
    LATENT = 6


class ImageSpan(NamedTuple):
    """Where one image lies in one row, and its token grid.

    `start:stop` are original indices; `grid` is (height, width) in tokens. A span may hold more tokens than
    `height * width` (a class token, an overview in front, a newline after each row of the grid): those are not patches of
    the grid. `patches()` says which are.

    Attributes:
        offset: tokens of the span before the first patch of the grid.
        stride: tokens from one row of the grid to the next; 0 means its width.
        tiles: how often the vision encoder ran for it.
    """

    start: int
    stop: int
    grid: tuple[int, int]
    offset: int = 0
    stride: int = 0
    tiles: int = 1

    def patches(self) -> Int[Tensor, "h w"]:
        """The original index of each patch of the grid."""
        height, width = self.grid
        rows = torch.arange(height).unsqueeze(1) * (self.stride or width)
        return self.start + self.offset + rows + torch.arange(width)

    def encoded(self) -> Int[Tensor, " n"]:
        """The original index of each token that shows something: patches, and what lies before them, but no newline."""
        return torch.cat([torch.arange(self.start, self.start + self.offset), self.patches().flatten()])


@dataclasses.dataclass(frozen=True)
class TokenMap:
    """What each token of a batch is.

    Attributes:
        group: `[b t]`, the `Group` of each token (one byte each).
        position_ids: `[b t]`, or `[axes b t]` for multi-axis rotary embeddings (M-RoPE).
        images: one tuple of `ImageSpan` a row, in order of appearance.
        segment: `[b t]`, the word or step that a streaming token belongs to; `None` outside streaming.
        ids: `[b t]`, the token ids, where the model was called with ids.
        present: the groups that occur, known on the host so that asking for them never waits for the device.
    """

    group: Int[Tensor, "b t"]
    position_ids: Tensor
    images: tuple[tuple[ImageSpan, ...], ...]
    segment: Int[Tensor, "b t"] | None = None
    ids: Int[Tensor, "b t"] | None = None
    present: frozenset[Group] = dataclasses.field(default=frozenset(), compare=False)

    def __post_init__(self) -> None:
        """Check shapes and find out which groups occur.

        Raises:
            ValueError: the shapes of the parts do not agree.
        """
        if self.group.ndim != 2:
            raise ValueError(f"TokenMap.group must be [b t], got shape {tuple(self.group.shape)}")
        for name in ("position_ids", "segment", "ids"):
            part = getattr(self, name)
            if part is not None and part.shape[-1] != self.group.shape[1]:
                raise ValueError(
                    f"TokenMap.{name} covers {part.shape[-1]} tokens, the groups {self.group.shape[1]}: pass one entry a token"
                )
        if len(self.images) != self.group.shape[0]:
            raise ValueError(
                f"TokenMap.images has {len(self.images)} rows for a batch of {self.group.shape[0]}: pass () for a row without images"
            )
        if not self.present:
            object.__setattr__(self, "present", frozenset(Group(int(g)) for g in self.group.unique()))

    @classmethod
    def from_inputs(cls, model: Any, inputs: Any, **overrides: Tensor) -> TokenMap:
        """Build the map from what a processor returned for `model`.

        Args:
            model: a Hugging Face model of a known family.
            inputs: a mapping with `input_ids` `[b t]` (or `inputs_embeds` `[b t d]`), and optionally `attention_mask` `[b t]`
                and `position_ids`.
            overrides: `group`, `segment` or `position_ids` tensors that replace what was found.

        Raises:
            ValueError: unknown family, no ids and no embeddings, an attention mask that is not 2-D, or image tokens whose
                number does not fit the model's grid.
        """
        found = _reader(model, inputs)
        return dataclasses.replace(found, present=frozenset(), **overrides) if overrides else found

    @classmethod
    def from_groups(
        cls,
        group: Int[Tensor, "b t"],
        *,
        images: Sequence[Sequence[ImageSpan]] | None = None,
        position_ids: Tensor | None = None,
        segment: Tensor | None = None,
    ) -> TokenMap:
        """Build a map from groups alone: positions count from 0, as Hugging Face models do without `position_ids`."""
        b, t = group.shape
        if position_ids is None:
            position_ids = torch.arange(t, device=group.device).expand(b, t)
        rows = tuple(tuple(row) for row in images) if images is not None else ((),) * b
        return cls(group=group.to(torch.int8), position_ids=position_ids, images=rows, segment=segment)

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.group.shape[0]

    @property
    def length(self) -> int:
        """Number of tokens a row, padding included."""
        return self.group.shape[1]

    @property
    def padded(self) -> bool:
        """Whether any token is padding (known on the host)."""
        return Group.PAD in self.present

    @property
    def valid(self) -> Bool[Tensor, "b t"]:
        """Which tokens are not padding."""
        return self.group != Group.PAD

    def has(self, *groups: Group) -> bool:
        """Whether any token of these groups occurs (known on the host)."""
        return not self.present.isdisjoint(groups)

    def of(self, *groups: Group) -> Bool[Tensor, "b t"]:
        """Which tokens belong to one of these groups."""
        mask = self.group == groups[0]
        for g in groups[1:]:
            mask = mask | (self.group == g)
        return mask

    def window(self, start: int, stop: int | None = None) -> TokenMap:
        """The map of tokens `start:stop` alone. Image spans keep their original indices."""
        if start == 0 and (stop is None or stop == self.length):
            return self
        return dataclasses.replace(
            self,
            group=self.group[:, start:stop],
            position_ids=self.position_ids[..., start:stop],
            segment=None if self.segment is None else self.segment[:, start:stop],
            ids=None if self.ids is None else self.ids[:, start:stop],
            present=frozenset(),
        )

    def extend(self, new: TokenMap) -> TokenMap:
        """This map followed by `new` (whose image spans already count from the start of this one)."""
        ours, theirs = self.position_ids, new.position_ids
        if ours.ndim != theirs.ndim:
            raise ValueError(f"position ids of {ours.ndim - 2} axes cannot follow those of {theirs.ndim - 2}")
        if (self.segment is None) != (new.segment is None):
            raise ValueError("a TokenMap with segments can only be extended by one with segments")
        return dataclasses.replace(
            self,
            group=torch.cat([self.group, new.group], dim=1),
            position_ids=torch.cat([ours, theirs], dim=-1),
            images=tuple(a + b for a, b in zip(self.images, new.images, strict=True)),
            segment=None if self.segment is None else torch.cat([self.segment, new.segment], dim=1),  # type: ignore[list-item]
            ids=None if self.ids is None or new.ids is None else torch.cat([self.ids, new.ids], dim=1),
            present=self.present | new.present,
        )

    def select(self, rows: Int[Tensor, " n"]) -> TokenMap:
        """The rows `rows` of the batch, in that order, as beams reorder them."""
        images = tuple(self.images[i] for i in rows.tolist()) if any(self.images) else ((),) * len(rows)
        return dataclasses.replace(
            self,
            group=self.group[rows],
            position_ids=self.position_ids[..., rows, :],
            images=images,
            segment=None if self.segment is None else self.segment[rows],
            ids=None if self.ids is None else self.ids[rows],
        )

    def crop(self, length: int) -> TokenMap:
        """The first `length` tokens; images that began later are gone."""
        images = tuple(tuple(s for s in row if s.stop <= length) for row in self.images)
        return dataclasses.replace(self.window(0, length), images=images)


def _no_reader(model: Any, inputs: Any) -> TokenMap:
    raise ValueError(
        "no model family is known: import sparing.anatomy (importing sparing.TokenMap does) before from_inputs"
    )


_reader: Callable[[Any, Any], TokenMap] = _no_reader


def read_inputs_with(reader: Callable[[Any, Any], TokenMap]) -> None:
    """Set what `TokenMap.from_inputs` calls. The family adapters live above this room and hand themselves in here."""
    global _reader
    _reader = reader
