"""Replace what chosen tokens hold: by something that says nothing, or by what others held."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sparing.ablate.places import Where, named, pictures_of, settled, tokens_at
from sparing.ablate.rewriting import Rewrite, at_layer, where_true
from sparing.plan import Policy, PromptView

BY = ("mean", "zero", "noise")


class _Replace(Rewrite):
    """See `replace`."""

    name = "replace"  # type: ignore[assignment]

    def __init__(self, where: Where, by: str | Tensor, seed: int, layer: int) -> None:
        super().__init__(layer)
        self.where, self.by, self.seed = settled(where, "replace(where=...)"), by, seed

    def settle(self, view: PromptView) -> dict[str, Tensor]:
        found = {"chosen": tokens_at(view, self.where, "replace(where=...)")}
        if isinstance(self.by, Tensor):
            if self.by.shape[:2] != view.tokens.group.shape or self.by.shape[2] != view.embeds.shape[2]:
                raise ValueError(
                    f"replace(by=...): the states have shape {list(self.by.shape)}; the prompts want "
                    f"{[*view.tokens.group.shape, view.embeds.shape[2]]}, one state a token (only those of `where` are used)"
                )
            found["given"] = self.by.to(view.embeds)
        elif self.by == "mean":
            # Padding belongs to no one; text and newlines are one more part of the row.
            part = pictures_of(view.tokens)
            found["part"] = torch.where(view.tokens.valid, part + 1, -1)
        elif self.by == "noise":
            # Counted without padding, so that a token gets the same noise in any batch.
            found["place"] = view.tokens.valid.long().cumsum(1).sub(1).clamp(min=0)
        return found

    def rewritten(self, states: Tensor, settled: dict[str, Tensor]) -> Tensor:
        if "given" in settled:
            new = settled["given"]
        elif self.by == "zero":
            new = torch.zeros_like(states)
        elif self.by == "mean":
            part = settled["part"]
            index = torch.where(part < 0, int(part.max()) + 1, part)
            one_hot = torch.nn.functional.one_hot(index).float()
            sums = one_hot.transpose(1, 2) @ states.float()
            means = sums / one_hot.sum(1).clamp(min=1).unsqueeze(-1)
            new = means.gather(1, index.unsqueeze(-1).expand_as(states))
        else:
            _, t, d = states.shape
            drawn = torch.randn(t, d, generator=torch.Generator().manual_seed(self.seed)).to(states.device)
            noise = torch.nn.functional.normalize(drawn, dim=-1)[settled["place"]]
            new = noise * states.float().norm(dim=-1, keepdim=True)
        return where_true(settled["chosen"], new, states)

    def __repr__(self) -> str:
        """As called."""
        seed = f", seed={self.seed}" if isinstance(self.by, str) and self.by == "noise" else ""
        by = "states" if isinstance(self.by, Tensor) else repr(self.by)
        return f"replace({named(self.where)}, by={by}{seed}{at_layer(self.layer)})"


def replace(
    where: Where,
    by: Literal["mean", "zero", "noise"] | Float[Tensor, "b t d"] = "mean",
    *,
    seed: int = 0,
    layer: int = 0,
) -> Policy:
    """Replace what chosen tokens of the prompt hold; they stay where they are, and are computed and read as before.

    The result goes into `sparing.apply` like a policy, under `execute="dense"`.

    Args:
        where: groups, a `Selection` (tokens of a class: `OfClass`), a function `TokenMap -> [b t]` or a mask.
        by: `mean`: the mean of all tokens of the token's own picture (of the row's text, for text); `zero`; `noise`: a
            direction drawn at random for each place of a row, with the length that the token had. Or states, one for each
            token of the prompts, of which those of `where` are used: what other tokens, or other prompts, held there (`record`).
        seed: of the noise.
        layer: at whose input; 0 is the prompt's embeddings.

    Raises:
        ValueError: an unknown `by`, states of another shape than the prompts, or (when applied) no such layer.
    """
    if not isinstance(by, Tensor) and by not in BY:
        raise ValueError(f"replace(by={by!r}): choose 'mean', 'zero' or 'noise'")
    return _Replace(where, by, seed, layer)
