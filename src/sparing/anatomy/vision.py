"""`VisionAnatomy`: what families that see pictures share. The layers inside are those of a text family."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sparing.anatomy.base import HFModule
from sparing.anatomy.encoder import EncoderAnatomy
from sparing.tokens import ImageSpan, TokenMap


class VisionAnatomy(EncoderAnatomy):
    """Where a vision model keeps its encoder and its pictures.

    A family's adapter says only that; `anatomy_of` puts it on the adapter of the decoder inside, which knows the layers.
    """

    decoders: ClassVar[Mapping[str, str]] = {}
    """Decoders of this family's own that have the layers of a known text family: their model type -> that family's."""

    @property
    def decoder(self) -> HFModule:
        """The language model inside."""
        return self.model.model.language_model

    @property
    def vision_encoder(self) -> HFModule:
        """The vision tower."""
        return self.model.model.vision_tower

    @property
    def projector(self) -> tuple[HFModule, ...]:
        """The one between the tower and the language model."""
        return (self.model.model.multi_modal_projector,)

    @property
    def pictures_from(self) -> HFModule:
        """The model around the language model."""
        return self.model.model

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width, in tokens, of what one run of the encoder gives."""
        (height, width), (patch_height, patch_width) = (
            both_sides(self.config.vision_config.image_size),
            both_sides(self.config.vision_config.patch_size),
        )
        return height // patch_height, width // patch_width

    @property
    def cell(self) -> tuple[int, int]:
        """Height and width, in pixels of the encoder's input, of what one token covers."""
        (height, width), (patch_height, patch_width) = (
            both_sides(self.config.vision_config.image_size),
            both_sides(self.config.vision_config.patch_size),
        )
        down, across = self.grid
        return height // patch_height // down * patch_height, width // patch_width // across * patch_width

    def token_pixels(self, inputs: Mapping[str, Any]) -> Float[Tensor, "tiles h w p"]:
        """The encoder's input, cut into what each token covers; one tile for every run of the encoder.

        Pixels that no patch covers, at the edges, are left out.

        Raises:
            ValueError: there are no pictures, or they have another size than the encoder's.
        """
        pixels = inputs.get("pixel_values")
        (down, across), (height, width) = self.grid, self.cell
        if pixels is None or tuple(pixels.shape[-2:]) != both_sides(self.config.vision_config.image_size):
            got = "none" if pixels is None else "x".join(map(str, pixels.shape[-2:]))
            raise ValueError(f"expected pictures of the encoder's size, got {got}: use the model's own processor")
        pixels = pixels.flatten(0, -4)[..., : down * height, : across * width]
        cut = pixels.reshape(*pixels.shape[:2], down, height, across, width)
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3)

    def is_image_token(self, input_ids: Tensor) -> Tensor:
        """Which ids are image placeholders (newline tokens inside a picture included)."""
        return input_ids == self.config.image_token_id

    def layouts(self, inputs: Mapping[str, Any]) -> Iterable[ImageSpan] | None:
        """The pictures in order, each as a span that starts at 0; `None` if all are alike (see `layout`)."""
        return None

    def layout(self) -> ImageSpan:
        """A picture of the encoder's own size, as a span that starts at 0."""
        height, width = self.grid
        return ImageSpan(0, height * width, self.grid)

    def pixels(self, inputs: Mapping[str, Any]) -> list[Float[Tensor, "c h w"]]:
        """What the encoder is given of each picture (each span of the rows, in order), normalised as it comes.

        Only what the span's grid covers: pixels that the encoder's patches leave over at the edge are cut off, and so is padding
        of which no token is left. Divided evenly, pixels fall to the tokens of the grid.
        """
        return [self._covered(one) for one in inputs["pixel_values"].flatten(0, -4)]

    def overviews(self, inputs: Mapping[str, Any]) -> list[Float[Tensor, "c h w"] | None]:
        """Of each picture, what the encoder is given as a whole beside its tiles, where those tokens lie before its grid."""
        return [None] * len(self.pixels(inputs))

    def _covered(self, picture: Tensor) -> Tensor:
        """A picture without the edge that is too narrow for a patch."""
        high, wide = both_sides(self.config.vision_config.patch_size)
        height, width = picture.shape[-2:]
        return picture[..., : height - height % high, : width - width % wide]

    def read_tokens(self, inputs: Mapping[str, Any]) -> TokenMap:
        """As in `Anatomy`.

        Raises:
            ValueError: there are videos.
        """
        if inputs.get("pixel_values_videos") is not None or _encoded(inputs, "video") is not None:
            raise ValueError("videos have no place in a TokenMap yet: pass pictures (frames as pictures of their own)")
        return super().read_tokens(inputs)

    def image_spans(self, inputs: Mapping[str, Any], is_image: Tensor) -> tuple[tuple[ImageSpan, ...], ...]:
        """Cut the image tokens of each row into pictures.

        Raises:
            ValueError: a row's image tokens are not a whole number of pictures, or the pictures described are not those in
                the text.
        """
        layouts = self.layouts(inputs)
        described = None if layouts is None else list(layouts)
        coming = itertools.repeat(self.layout()) if described is None else iter(described)
        copies = _copies(inputs, described)
        rows: list[tuple[ImageSpan, ...]] = []
        for r, row in enumerate(is_image):
            if r % copies:
                rows.append(rows[-1])
            else:
                rows.append(tuple(_cut(r, row.nonzero().flatten().tolist(), coming)))
        if described is not None and (left := sum(1 for _ in coming)):
            raise ValueError(
                f"the inputs describe {left} more pictures than there are in the text: build them with one processor call"
            )
        return tuple(rows)

    def feature_norms(self, features: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        """As in `Anatomy`, of the layers that the config names."""
        norms = self.encoder_states(features).float().norm(dim=-1, keepdim=True)
        return self.of_tokens(norms, inputs, "max").flatten()

    def encoder_states(self, features: Any) -> Tensor:
        """What the encoder gave for every position, of the layer that the config names (of all of them, joined)."""
        layer = getattr(self.config, "vision_feature_layer", -1)
        if isinstance(layer, int):
            states = features.last_hidden_state if features.hidden_states is None else features.hidden_states[layer]
        else:
            states = torch.cat([features.hidden_states[i] for i in layer], dim=-1)
        return states


def _encoded(inputs: Mapping[str, Any], kind: str) -> Any:
    """What was encoded before the model's forward, if anything was."""
    outputs = inputs.get("mm_encoder_outputs")
    return outputs.get(kind) if isinstance(outputs, dict) else None


def _copies(inputs: Mapping[str, Any], described: list[ImageSpan] | None) -> int:
    """How often each row of the described batch stands there: `generate` repeats rows and features, but not sizes."""
    encoded = _encoded(inputs, "image")
    if not described or encoded is None:
        return 1
    given, expected = sum(len(part) for part in encoded.pooler_output), sum(layout.stop for layout in described)
    if given == 0 or given % expected:
        raise ValueError(
            f"{given} encoded image tokens came where the pictures make {expected}: leave prefill_chunk_size out (a prefill in "
            "chunks cuts pictures apart), and build the inputs with one processor call"
        )
    return given // expected


def _cut(row: int, where: list[int], coming: Iterator[ImageSpan]) -> Iterator[ImageSpan]:
    """The pictures of one row, from the indices of its image tokens."""
    at = 0
    while at < len(where):
        layout = next(coming, None)
        if layout is None:
            raise ValueError(
                f"row {row} has image tokens of a picture that the inputs do not describe: build them with one processor call"
            )
        size = layout.stop
        if len(where) - at < size:
            raise ValueError(
                f"row {row} has {len(where)} image tokens, but this model makes {size} a picture: "
                f"build the inputs with the model's own processor ({len(where) - at} are left for the last one), and leave "
                "prefill_chunk_size out (a prefill in chunks cuts pictures apart)"
            )
        start, stop = where[at], where[at + size - 1] + 1
        if stop - start != size:
            raise ValueError(
                f"row {row}: the image tokens from {start} on are interrupted by text after fewer than {size}"
            )
        yield layout._replace(start=start, stop=stop)
        at += size


def both_sides(size: int | Iterable[int]) -> tuple[int, int]:
    """A size that a config gives as one number or as two."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def transformer_flops(vision: Any, tokens: int, *, gated: bool = False, reach: int | None = None) -> int:
    """One encoder layer's matrix products: projections, scores and mixing, MLP.

    Args:
        vision: the encoder's config.
        tokens: how many go through.
        gated: whether the MLP has three matrices.
        reach: tokens that each one attends to; all by default.
    """
    d, n = vision.hidden_size, tokens
    reach = n if reach is None else reach
    return 8 * n * d * d + 4 * n * reach * d + (6 if gated else 4) * n * d * vision.intermediate_size
