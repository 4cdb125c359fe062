"""`EncoderNotes`: what the vision encoder's layers attended to, and what its projector read, for those policies that look there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparing.anatomy import Anatomy
from sparing.anatomy.encoder import EncoderAnatomy, EncoderLayer
from sparing.tokens import TokenMap

CHUNK = 64
"""Patches that ask at once, where all do."""


class EncoderNotes:
    """Notes what enters chosen layers of the encoder while pictures are encoded; works scores out where they are asked for.

    The encoder runs as it is, on whatever attention kernel: queries and keys of the noted layers are computed once more, and never
    more than `CHUNK` rows of scores at a time.

    Args:
        anatomy: where the parts of the model are.
        layers: the layers that policies look at.

    Raises:
        ValueError: the family cannot tell, or there is no such layer.
    """

    def __init__(self, anatomy: Anatomy, layers: Iterable[EncoderLayer]) -> None:
        self._anatomy = anatomy if isinstance(anatomy, EncoderAnatomy) else None
        self._layers = {self._anatomy.encoder_layer(which) for which in layers} if self._anatomy is not None else set()
        self.inputs: Mapping[str, Any] = {}
        self.flops = 0
        """What was computed since this was last set to 0."""
        self.clear()

    def clear(self) -> None:
        """Forget the pictures."""
        self._entered: dict[int, tuple[Tensor, Mapping[str, Any]]] = {}
        self._read: Tensor | None = None
        self.inputs = {}

    def install(self, stack: contextlib.ExitStack) -> None:
        """Put the hooks on, until the stack is closed."""
        if self._anatomy is None or not self._layers:
            return
        for layer in self._layers:
            module = self._anatomy.encoder_attentions[layer]
            stack.callback(module.register_forward_pre_hook(self._noting(layer), with_kwargs=True).remove)
        stack.callback(self._anatomy.token_projector.register_forward_pre_hook(self._before_projector).remove)

    def _noting(self, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def note(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._entered[layer] = args[0] if args else kwargs["hidden_states"], kwargs

        return note

    def _before_projector(self, _: nn.Module, args: Any) -> None:
        self._read = args[0]

    # What policies ask for -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def attention(self, which: EncoderLayer, tokens: TokenMap) -> Tensor:
        """`[b t]`, see `PromptView.encoder_attention`."""
        anatomy = self._require()
        layer, states, given = self._noted(which)
        lengths = anatomy.encoder_lengths(given)
        if anatomy.class_token:
            query, key = anatomy.encoder_query_key(layer, states[:, :1], states)
        else:
            query, key = anatomy.encoder_query_key(layer, states, states)
        self.flops += 2 * states.shape[-1] ** 2 * (query.numel() + key.numel()) // states.shape[-1]
        query, key = (anatomy.encoder_rotate(layer, x, given) for x in (query, key))
        if lengths is None:
            received = self._received(query, key, _shown(given, states))
        else:
            parts = zip(query.split(lengths), key.split(lengths), strict=True)
            received = torch.cat([self._received(q[None], k[None], None).flatten() for q, k in parts])
        return self._placed(anatomy.of_tokens(received.unsqueeze(-1), self.inputs, "mean"), tokens).squeeze(-1)

    def _received(self, query: Tensor, key: Tensor, shown: Tensor | None) -> Tensor:
        """`[s n]`, the mean over heads and queries of what keys receive. query: `[s q heads e]`; key: `[s n heads e]`."""
        total = torch.zeros(key.shape[:2], device=key.device)
        asking = shown if shown is not None and query.shape[1] == key.shape[1] else None
        key = key.permute(0, 2, 3, 1)
        for first in range(0, query.shape[1], CHUNK):
            some = query[:, first : first + CHUNK].transpose(1, 2)
            self.flops += 2 * some.numel() * key.shape[-1]
            scores = (some @ key).float()
            if shown is not None:
                scores = scores.masked_fill(~shown[:, None, None], float("-inf"))
            weights = scores.softmax(-1).mean(1)
            if asking is not None:
                weights = weights * asking[:, first : first + CHUNK, None]
            total += weights.sum(1)
        return total / (query.shape[1] if asking is None else asking.sum(1, keepdim=True).clamp(min=1))

    @torch.no_grad()
    def keys(self, which: EncoderLayer, tokens: TokenMap) -> Tensor:
        """`[b t c]`, see `PromptView.encoder_keys`."""
        anatomy = self._require()
        layer, states, _ = self._noted(which)
        self.flops += 2 * states.numel() * states.shape[-1]
        _, key = anatomy.encoder_query_key(layer, states, states)
        return self._placed(anatomy.of_tokens(key.mean(-2), self.inputs, "mean"), tokens)

    def states(self, tokens: TokenMap) -> Tensor:
        """`[b t c]`, see `PromptView.encoder_states`."""
        if self._read is None:
            raise ValueError(UNSEEN)
        return self._placed(self._require().behind_tokens(self._read, self.inputs), tokens)

    def project(self, states: Tensor) -> Tensor:
        """`[n c]` -> `[n d]`."""
        read, anatomy = self._read, self._require()
        projected = anatomy.project_tokens(states)
        self._read = read  # The hook took these states for a picture's.
        self.flops += sum(2 * p.numel() * len(states) for p in anatomy.token_projector.parameters() if p.ndim == 2)
        return projected

    def _require(self) -> EncoderAnatomy:
        if self._anatomy is None or not self._layers:
            raise ValueError(
                "nobody noted what the vision encoder did: set looks_at_encoder on the policy to the layers that it asks for"
            )
        return self._anatomy

    def _noted(self, which: EncoderLayer) -> tuple[int, Tensor, Mapping[str, Any]]:
        layer = self._require().encoder_layer(which)
        if layer not in self._layers:
            raise ValueError(
                f"nobody noted layer {layer} of the vision encoder: add {which} to the policy's looks_at_encoder"
            )
        if layer not in self._entered:
            raise ValueError(UNSEEN)
        return layer, *self._entered[layer]

    def _placed(self, values: Tensor, tokens: TokenMap) -> Tensor:
        """What the image tokens of a batch have, in order, `[m c]` -> `[b t c]`; NaN in all other tokens."""
        where = torch.zeros(tokens.batch, tokens.length, dtype=torch.bool)
        for row, spans in enumerate(tokens.images):
            for span in spans:
                where[row, span.start : span.stop] = True
        counts = where.sum(1).tolist()
        copies, over = divmod(sum(counts), max(len(values), 1))
        if over or not copies:
            raise ValueError(
                f"the prompt has {sum(counts)} image tokens, the vision encoder gave {len(values)}: build the inputs with one "
                "processor call, encode pictures inside sparing.apply, and leave prefill_chunk_size out"
            )
        if copies > 1:
            # `generate` repeats rows for beams, and what was encoded, but here are the pictures as they were encoded.
            parts = values.split(counts[::copies])
            values = torch.cat([parts[row // copies] for row in range(tokens.batch)])
        out = values.new_full((tokens.batch, tokens.length, values.shape[-1]), float("nan"))
        return out.masked_scatter(where.to(values.device).unsqueeze(-1), values)


UNSEEN = (
    "the vision encoder's layers were not seen at work: give pixel_values to the model (or to generate) inside sparing.apply, not "
    "embeddings or pictures that were encoded before"
)


def _shown(given: Mapping[str, Any], states: Tensor) -> Tensor | None:
    """`[tiles n]`, which positions are no padding; `None` where all are."""
    mask = given.get("attention_mask")
    if mask is None:
        return None
    mask = mask if mask.ndim == 2 else mask[:, 0, 0]
    # Added to scores a mask is 0 where it hides nothing; given to the kernels for padding it is 0 where it hides.
    mask = mask if mask.dtype == torch.bool else (mask == 0 if mask.is_floating_point() else mask != 0)
    return mask.expand(states.shape[:2])
