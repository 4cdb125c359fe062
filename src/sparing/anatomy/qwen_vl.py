"""Qwen2.5-VL and Qwen3-VL: pictures of any size, merged patches, positions of three axes, features added between layers (3)."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sparing.anatomy.base import HFModule
from sparing.anatomy.encoder import Fold
from sparing.anatomy.vision import VisionAnatomy, both_sides, transformer_flops
from sparing.tokens import ImageSpan, TokenMap

AXES = 3
"""Time, height and width."""


class QwenVLAnatomy(VisionAnatomy):
    """What `Qwen2_5_VLForConditionalGeneration` and `Qwen3VLForConditionalGeneration` share."""

    picture_sizes = ("image_grid_thw",)

    @property
    def vision_encoder(self) -> HFModule:
        """The vision transformer with its merger."""
        return self.model.model.visual

    @property
    def projector(self) -> tuple[HFModule, ...]:
        """The merger at the encoder's end, and those of the features that are added between layers."""
        return (self.vision_encoder.merger, *getattr(self.vision_encoder, "deepstack_merger_list", ()))

    @property
    def grid(self) -> tuple[int, int]:
        """Pictures have sizes of their own; this one, of 32 x 32 patches, stands for them where one must."""
        side = 32 // self.config.vision_config.spatial_merge_size
        return side, side

    @property
    def cell(self) -> tuple[int, int]:
        """As in `VisionAnatomy`: merged patches."""
        vision = self.config.vision_config
        height, width = both_sides(vision.patch_size)
        return height * vision.spatial_merge_size, width * vision.spatial_merge_size

    def token_pixels(self, inputs: Mapping[str, Any]) -> Float[Tensor, "tiles h w p"]:
        """As in `VisionAnatomy`, of one picture: its patches lie in the order of the tokens they are merged into.

        Raises:
            ValueError: there is not exactly one picture.
        """
        (span, *more) = self.layouts(inputs)
        if more:
            raise ValueError(
                f"expected one picture, got {1 + len(more)}: they have sizes of their own, give one at a time"
            )
        return inputs["pixel_values"].reshape(1, *span.grid, -1)

    def layouts(self, inputs: Mapping[str, Any]) -> Iterable[ImageSpan]:
        """From `image_grid_thw`; a token covers `spatial_merge_size` squared patches.

        Raises:
            ValueError: no `image_grid_thw`.
        """
        grids = inputs.get("image_grid_thw")
        if grids is None:
            raise ValueError(
                "image tokens without image_grid_thw: pass what the processor returned, encode pictures inside apply, and leave "
                "prefill_chunk_size out"
            )
        return self._layouts(grids.tolist())

    def _layouts(self, grids: list[list[int]]) -> Iterator[ImageSpan]:
        merge = self.config.vision_config.spatial_merge_size
        for frames, height, width in grids:
            if frames != 1:
                raise ValueError(
                    f"a picture of {frames} frames has no grid of height and width: pass one frame a picture"
                )
            down, across = height // merge, width // merge
            yield ImageSpan(0, down * across, (down, across))

    def pixels(self, inputs: Mapping[str, Any]) -> list[Float[Tensor, "c h w"]]:
        """As in `VisionAnatomy`, from the flat patches, which come merged token by merged token."""
        vision = self.config.vision_config
        merge, (high, wide) = vision.spatial_merge_size, both_sides(vision.patch_size)
        grids = inputs["image_grid_thw"]
        found = []
        for (_, height, width), patches in zip(
            grids.tolist(), inputs["pixel_values"].split(grids.prod(1).tolist()), strict=True
        ):
            # Frames of one picture repeat it: the first is enough.
            shape = (height // merge, width // merge, merge, merge, vision.in_channels, -1, high, wide)
            tiles = patches.reshape(shape)[:, :, :, :, :, 0]
            found.append(tiles.permute(4, 0, 2, 5, 1, 3, 6).reshape(vision.in_channels, height * high, width * wide))
        return found

    def read_tokens(self, inputs: Mapping[str, Any]) -> TokenMap:
        """As in `Anatomy`, with the model's own positions where they can be told."""
        found = super().read_tokens(inputs)
        positions = found.position_ids
        ids, types, grids = (inputs.get(name) for name in ("input_ids", "mm_token_type_ids", "image_grid_thw"))
        if inputs.get("position_ids") is None and ids is not None and types is not None and grids is not None:
            mask = inputs.get("attention_mask")
            positions, _ = self.model.model.get_rope_index(ids, types, image_grid_thw=grids, attention_mask=mask)
        return dataclasses.replace(found, position_ids=self.positions(positions))

    def positions(self, position_ids: Tensor) -> Tensor:
        """`[3 b t]`, from one row a token, from three, or from three behind that of the text."""
        if position_ids.ndim == 2:
            return position_ids.expand(AXES, *position_ids.shape)
        return position_ids[-AXES:].expand(AXES, *position_ids.shape[1:])

    @property
    def remembers_positions(self) -> HFModule:
        """The model around encoder and decoder."""
        return self.model.model

    def rotary(self, hidden: Tensor, position_ids: Tensor, kind: str = "all") -> tuple[Tensor, Tensor]:
        """Cosines and sines `[b t head_dim]`, each part of a head turned by its axis."""
        return super().rotary(hidden, self.positions(position_ids), kind)

    @property
    def encoder_attentions(self) -> Sequence[HFModule]:
        """The attention modules of the encoder's layers."""
        return [block.attn for block in self.vision_encoder.blocks]

    def encoder_query_key(self, layer: int, asking: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """As in `EncoderAnatomy`; all patches ask."""
        assert asking is asked, "there is no class token to ask for all"
        attention = self.encoder_attentions[layer]
        query, key, _ = attention.qkv(asked).unflatten(-1, (3, attention.num_heads, -1)).unbind(-3)
        return query * attention.scaling, key

    def encoder_rotate(self, layer: int, x: Tensor, given: Mapping[str, Any]) -> Tensor:
        """By a patch's place in its picture."""
        rotate = sys.modules[type(self.encoder_attentions[layer]).__module__].apply_rotary_pos_emb_vision
        return rotate(x, x, *given["position_embeddings"])[0]

    def encoder_lengths(self, given: Mapping[str, Any]) -> list[int]:
        """Pictures, or the windows of one, lie one behind the other."""
        return given["cu_seqlens"].diff().tolist()

    def encoder_states(self, features: Any) -> Tensor:
        """What the encoder gave for every patch, `[patches d]`."""
        return features.last_hidden_state

    def of_tokens(self, values: Tensor, inputs: Mapping[str, Any], fold: Fold) -> Tensor:
        """A token covers the patches that are merged into it: `[patches c]` -> `[n c]`."""
        tokens = values.unflatten(0, (-1, self.config.vision_config.spatial_merge_size**2))
        return self.in_order(tokens.mean(1) if fold == "mean" else tokens.amax(1), inputs)

    def behind_tokens(self, read: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """The patches that are merged into a token, one behind the other."""
        return self.in_order(
            read.unflatten(0, (-1, self.config.vision_config.spatial_merge_size**2)).flatten(1), inputs
        )

    def project_tokens(self, behind: Tensor) -> Tensor:
        """As in `EncoderAnatomy`: the merger takes patches."""
        patches = behind.unflatten(-1, (self.config.vision_config.spatial_merge_size**2, -1))
        return self.token_projector(patches.flatten(0, 1))

    def in_order(self, tokens: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Tokens `[n c]` from the order in which the encoder keeps them to that of the prompt."""
        return tokens

    def encoder_flops(self) -> int:
        """For a picture of 32 x 32 patches. The ledger counts every picture's own (`picture_flops`)."""
        return self.picture_flops(ImageSpan(0, 0, self.grid))

    def picture_flops(self, span: ImageSpan) -> int:
        """Patch embedding, all layers, and the merger."""
        vision = self.config.vision_config
        merge = vision.spatial_merge_size**2
        tokens = span.grid[0] * span.grid[1]
        patches, d = tokens * merge, vision.hidden_size
        (high, wide), (frames, _) = both_sides(vision.patch_size), both_sides(vision.temporal_patch_size)
        embedding = 2 * patches * d * vision.in_channels * frames * high * wide
        return (
            embedding
            + self.layer_flops(patches)
            + self.mergers * 2 * tokens * merge * d * (merge * d + vision.out_hidden_size)
        )

    mergers = 1
    """How many mergers run on the patches."""

    def layer_flops(self, patches: int) -> int:
        """All layers of the encoder, every patch attending to all."""
        vision = self.config.vision_config
        return vision.depth * transformer_flops(vision, patches)


class Qwen2_5VLAnatomy(QwenVLAnatomy):
    """`Qwen2_5_VLForConditionalGeneration`."""

    model_types = ("qwen2_5_vl",)
    decoders: ClassVar[Mapping[str, str]] = {"qwen2_5_vl_text": "qwen2"}

    def in_order(self, tokens: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """The encoder keeps tokens by windows, and their order comes back at its end."""
        vision, start = self.config.vision_config, 0
        (wide, _), merge, order = both_sides(vision.patch_size), vision.spatial_merge_size, []
        side = vision.window_size // merge // wide
        for _, height, width in inputs["image_grid_thw"].tolist():
            down, across = height // merge, width // merge
            row, column = torch.meshgrid(torch.arange(down), torch.arange(across), indexing="ij")
            window = row // side * across + column // side
            order.append(start + window.flatten().argsort(stable=True))
            start += down * across
        return tokens[torch.cat(order).argsort().to(tokens.device)]

    def layer_flops(self, patches: int) -> int:
        """Most layers attend within windows. Windows cut by a picture's edge count as whole ones."""
        vision = self.config.vision_config
        wide, _ = both_sides(vision.patch_size)
        side = vision.window_size // vision.spatial_merge_size // wide * vision.spatial_merge_size
        whole = len([i for i in vision.fullatt_block_indexes if i < vision.depth])
        window = transformer_flops(vision, patches, gated=True, reach=min(side**2, patches))
        return whole * transformer_flops(vision, patches, gated=True) + (vision.depth - whole) * window


class Qwen3VLAnatomy(QwenVLAnatomy):
    """`Qwen3VLForConditionalGeneration`.

    After each of the first layers the model adds features of the encoder to the image tokens' residual. They are added to every
    token that is not dropped, whatever a plan leaves out: a token that skips all branches changes all the same.
    """

    model_types = ("qwen3_vl",)
    decoders: ClassVar[Mapping[str, str]] = {"qwen3_vl_text": "qwen3"}
    adds = ("visual_pos_masks", "deepstack_visual_embeds")

    @property
    def added_after(self) -> tuple[int, ...]:
        """One layer for each of the encoder's that is tapped."""
        return tuple(range(len(self.config.vision_config.deepstack_visual_indexes)))

    def additions(self, kwargs: Mapping[str, Any]) -> dict[int, tuple[Tensor, Tensor]]:
        """The features of the encoder's layers, for the image tokens."""
        features, where = kwargs.get("deepstack_visual_embeds"), kwargs.get("visual_pos_masks")
        if features is None or where is None:
            return {}
        return {layer: (where, part) for layer, part in enumerate(features)}

    def window(self, layer: int) -> int | None:
        """No layer slides (Qwen3's own config names the layers that do; this one has no such entry)."""
        return None

    @property
    def mergers(self) -> int:  # type: ignore[override]
        """One for the tokens, one for each layer whose features are added."""
        return 1 + len(self.config.vision_config.deepstack_visual_indexes)
