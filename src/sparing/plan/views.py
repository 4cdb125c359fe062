"""What those who decide may look at: one layer of a pass, and the prompt before the first layer."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparing.plan.cost import ModelShape
from sparing.tokens import TokenMap


class View(abc.ABC):
    """What a policy may look at in one layer of one forward pass. `t` is the number of new tokens, `T` of all so far."""

    layer: int
    shape: ModelShape
    tokens: TokenMap
    """All tokens so far, `[b T]`."""
    new: TokenMap
    """The tokens of this forward pass, `[b t]`."""
    state: dict[str, Any]
    """This policy's own memory for this run. Tensors in it have the batch first, and are reordered with beams."""

    @property
    @abc.abstractmethod
    def residual(self) -> Float[Tensor, "b t d"]:
        """The residual stream: the layer's input in `plan_attend`, the sum with attention in `plan_feed`.

        Do not write to it, and clone what you keep beyond this call: its memory is used again.
        """

    @property
    @abc.abstractmethod
    def prefill(self) -> bool:
        """Whether this pass reads the prompt (nothing is cached yet)."""

    @property
    @abc.abstractmethod
    def prompt_length(self) -> int:
        """Number of tokens of the prompt, padding included."""

    @abc.abstractmethod
    def normed(self) -> Float[Tensor, "b t d"]:
        """The residual after this branch's norm: what attention reads in `plan_attend`, the MLP in `plan_feed`."""

    @abc.abstractmethod
    def alive(self) -> Bool[Tensor, "b T"]:
        """Which tokens are neither padding nor dropped."""

    @abc.abstractmethod
    def scores(
        self, queries: Int[Tensor, "b q"], keys: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b heads q k"]:
        """This layer's attention probabilities for chosen queries, over every key that is alive and readable.

        Args:
            queries: indices among the new tokens, `0..t-1`.
            keys: original indices of the columns to return; all `T` of them if `None`. The softmax runs over every
                readable key either way.
        """

    @abc.abstractmethod
    def keys(self) -> Float[Tensor, "b kv_heads t head_dim"]:
        """This layer's keys of the new tokens, as attention reads them (rotated), whoever may read them."""

    @abc.abstractmethod
    def final_norm(self, states: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """What the norm behind the last layer makes of these states."""

    @abc.abstractmethod
    def shared(self, name: str, build: Callable[[], Tensor], owner: object) -> Tensor:
        """A tensor that is the same in every layer of this pass, built once. Executors share what they derive from it."""

    @abc.abstractmethod
    def drop(self, mask: Bool[Tensor, "b T"]) -> None:
        """Drop tokens: from this layer on (in `plan_feed`: from the next one on) they are neither computed nor read."""

    @abc.abstractmethod
    def spend(self, flops: int) -> None:
        """Book what deciding cost (a router's matrix products), so that the ledger counts it."""

    @property
    @abc.abstractmethod
    def encoder_features(self) -> Any:
        """What the vision encoder returned for this prompt's pictures; `None` if there were none."""


class PromptView(abc.ABC):
    """What a policy may look at, and change, once per prompt before the first layer."""

    shape: ModelShape
    tokens: TokenMap
    embeds: Float[Tensor, "b t d"]
    """The prompt's embeddings. Assign to rewrite or merge them."""
    position_ids: Tensor
    """`[b t]` or `[axes b t]`. Assign to re-index; decoding goes on from the shifted positions."""
    state: dict[str, Any]

    @abc.abstractmethod
    def drop(self, mask: Bool[Tensor, "b t"]) -> None:
        """Drop tokens before the first layer."""

    @abc.abstractmethod
    def spend(self, flops: int) -> None:
        """Book what deciding cost, so that the ledger counts it (with the first layer's routers)."""

    @property
    @abc.abstractmethod
    def vocabulary(self) -> Float[Tensor, "v d"]:
        """The input embedding of every word that the model knows."""

    @property
    @abc.abstractmethod
    def encoder_features(self) -> Any:
        """What the vision encoder returned for this prompt's pictures; `None` if there were none."""

    @abc.abstractmethod
    def encoder_attention(self, layer: int | float | None = None) -> Float[Tensor, "b t"]:
        """How much attention each image token received in a layer of the vision encoder; NaN in newlines and other tokens.

        From the class token, where the encoder has one; else from all patches of its picture (of its tile or window, where the
        layer sees no further), on average. It is the mean over heads, and over the patches that a token covers; float32, without
        gradients. The policy must name the layer in `looks_at_encoder`.

        Args:
            layer: its number (negative from the end), a share of the depth, or `None` for the layer whose output is projected.

        Raises:
            ValueError: nobody noted the layer, or pictures were not encoded in this run.
        """

    @abc.abstractmethod
    def encoder_keys(self, layer: int | float | None = None) -> Float[Tensor, "b t c"]:
        """The keys of each image token in a layer of the vision encoder, not rotated: the mean over heads and a token's patches.

        NaN in newlines and other tokens; without gradients. As in `encoder_attention` for the rest.
        """

    @abc.abstractmethod
    def encoder_states(self) -> Float[Tensor, "b t c"]:
        """What the projector read of each image token (its patches joined, where it covers several); NaN elsewhere."""

    @abc.abstractmethod
    def project(self, states: Float[Tensor, "n c"]) -> Float[Tensor, "n d"]:
        """What the projector makes of such states: image tokens as they enter the first layer."""
