"""Kinds of text tokens, told from the token alone, so that a plan by kind is causal: in the prompt and in decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from sparing.tokens import TokenMap

KINDS = ("first", "digits", "letters", "signs")
FIRST, DIGITS, LETTERS, SIGNS = range(len(KINDS))
IMAGE = "image"
"""The kind of a picture's tokens, told from the token map (`Group.IMAGE`) and not from ids."""
MEANING = {
    "first": "the first token of a window, where models put the attention they do not need",
    "digits": "tokens with a digit",
    "letters": "tokens with a letter and no digit",
    "signs": "punctuation, space and special tokens",
    IMAGE: "the tokens of pictures",
}


class TokenKinds:
    """Says which kind each token is: `first`, `digits`, `letters` or `signs`. Every token is of one kind.

    Args:
        model: the Hugging Face model.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        size = embedding.weight.shape[0]
        texts = tokenizer.batch_decode([[i] for i in range(min(size, len(tokenizer)))], skip_special_tokens=True)
        table = torch.full((size,), SIGNS)
        for i, text in enumerate(texts):
            if any(map(str.isdigit, text)):
                table[i] = DIGITS
            elif any(map(str.isalpha, text)):
                table[i] = LETTERS
        self._table = table.to(embedding.weight.device)

    def of(self, ids: Int[Tensor, "b t"], position_ids: Tensor) -> Int[Tensor, "b t"]:
        """The kind of each token, as an index into `KINDS`."""
        kinds = self._table.to(ids.device)[ids]
        return kinds.masked_fill(position_ids == 0, FIRST)

    def of_windows(self, ids: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
        """The same for windows, whose positions count from 0."""
        return self.of(ids, torch.arange(ids.shape[1], device=ids.device))

    def where(self, name: str) -> Callable[[TokenMap], Tensor]:
        """What `EnterLate(where=...)` takes: which tokens of a pass are of this kind."""
        kind = KINDS.index(name)

        def mask(tokens: TokenMap) -> Tensor:
            if tokens.ids is None:
                raise ValueError("token kinds are told from token ids: call the model with input_ids")
            positions = tokens.position_ids if tokens.position_ids.ndim == 2 else tokens.position_ids[0]
            return self.of(tokens.ids, positions) == kind

        return mask
