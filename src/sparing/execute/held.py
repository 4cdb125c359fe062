"""`HeldPictures`: what is kept of encoded pictures, for prompts to come."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from sparing.anatomy import Anatomy
from sparing.execute.latest import Latest
from sparing.tokens import ImageSpan

PLACES = 2
"""Rotated keys are kept for so many places of a picture."""


@dataclasses.dataclass(frozen=True)
class HeldPicture:
    """Which of the held tokens are one picture's: `start:stop`, in spans as a prompt has them (several where it is tiled)."""

    start: int
    stop: int
    spans: tuple[ImageSpan, ...]


@dataclasses.dataclass(eq=False)
class Place:
    """A picture at some positions, with what was worked out for it there.

    Attributes:
        picture: which one.
        positions: `[s]`, or `[axes s]`.
        angles: cosines and sines by the kind of layer (`Anatomy.rotary_kind`).
        keys: `[kv_heads s head_dim]`, rotated, by layer.
    """

    picture: int
    positions: Tensor
    angles: dict[str, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)
    keys: dict[int, Tensor] = dataclasses.field(default_factory=dict)


class HeldPictures:
    """The states of pictures that no layer changes, and their keys and values in the layers that read them.

    Keys are held before rotary embedding: they do not depend on where a picture stands in a prompt. Rotated ones are kept for the
    latest places of each picture.

    Args:
        anatomy: the model's.
        pictures: which tokens are whose.
        states: `[n d]`, what enters the first layer.
        additions: by layer, `[n d]` that the model adds behind it (DeepStack): a later layer reads the sum.
        layers: the layers that read pictures.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        pictures: Sequence[HeldPicture],
        states: Tensor,
        additions: Mapping[int, Tensor],
        layers: Sequence[int],
    ) -> None:
        self.pictures, self.layers = tuple(pictures), frozenset(layers)
        self._anatomy, self.additions = anatomy, dict(sorted(additions.items()))
        self._states = {0: states}
        # [1 n kv_heads head_dim] and [kv_heads n head_dim]
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        for layer in sorted(layers):
            normed = anatomy.attention_norm(layer)(self.state(layer).unsqueeze(0))
            self._keys[layer] = anatomy.key(layer, normed)
            self._values[layer] = anatomy.value(layer, normed).squeeze(0).transpose(0, 1).contiguous()
        self._places: dict[int, Latest[Place]] = {}

    def tensors(self) -> list[Tensor]:
        """States, keys, values, and the rotated keys that are kept at the moment."""
        kept = [x for places in self._places.values() for place in places.values() for x in place.keys.values()]
        return [*self._states.values(), *self.additions.values(), *self._keys.values(), *self._values.values(), *kept]

    def state(self, layer: int) -> Tensor:
        """`[n d]`, what enters a layer: what entered the first, and what was added since."""
        last = max((added + 1 for added in self.additions if added < layer), default=0)
        if last not in self._states:
            before = self.state(last - 1)
            self._states[last] = before + self.additions[last - 1].to(before)
        return self._states[last]

    def place(self, picture: int, positions: Tensor) -> Place:
        """A picture at positions `[s]` (or `[axes s]`), on the host; the same object where it lately was there before."""
        kept = self._places.setdefault(picture, Latest(PLACES))
        return kept.take(positions.numpy().tobytes(), lambda: Place(picture, positions.to(self._states[0].device)))

    def keys(self, layer: int, places: Sequence[Place]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Rotated keys, and values, `[kv_heads s head_dim]` of each picture in its place."""
        pictures = [self.pictures[place.picture] for place in places]
        values = tuple(self._values[layer][:, held.start : held.stop] for held in pictures)
        return tuple(self._turned(layer, place) for place in places), values

    def _turned(self, layer: int, place: Place) -> Tensor:
        held, kind = self.pictures[place.picture], self._anatomy.rotary_kind(layer)
        key = self._keys[layer][:, held.start : held.stop]
        if kind is None:
            return key.squeeze(0).transpose(0, 1)
        if layer not in place.keys:
            if kind not in place.angles:
                states = self._states[0][held.start : held.stop].unsqueeze(0)
                place.angles[kind] = self._anatomy.rotary(states, place.positions.unsqueeze(-2), kind)
            turned = self._anatomy.rotate(key, *place.angles[kind])
            place.keys[layer] = turned.squeeze(0).transpose(0, 1).contiguous()
        return place.keys[layer]


def held_once(tensors: Iterable[Tensor]) -> Iterator[int]:
    """Bytes of each storage that tensors lie in, views of one counted once."""
    yield from {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values()
