"""CDPruner: keep the picture tokens that are most diverse where they matter to the question (a conditional DPP)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparing.plan import PromptView
from sparing.policies.pictures import PicturePruning, rows_at
from sparing.tokens import Group, ImageSpan

EPSILON = 1e-6
"""Relevance of the least relevant token."""
ROUNDING = 1e-5
"""What a token adds of its own, between 0 and 1, below which float32 cannot tell it from nothing."""
Relevance = Callable[[PromptView], Float[Tensor, "b t"]]


class CDPruner(PicturePruning):
    """Greedy MAP inference of a determinantal point process whose kernel is similarity times relevance; before the first layer.

    The kernel of a picture is `L = diag(r) S diag(r)`: `S` the cosines of its tokens (behind the projector), `r` their relevance to
    the question, scaled to 0..1 within the picture. Each step takes the token that adds most to `log det L`.

    Args:
        keep: share of each picture's tokens that stays.
        relevance: what says how relevant each token is, larger for more: a function of the prompt -> `[b t]`. By default
            `relevance_of_words`: the mean cosine of a token to the embeddings of the text behind the picture. With the CLIP model
            that the tower came from: `CDPruner.with_clip`.

    Raises:
        ValueError: a share that is not above 0 and at most 1.

    Paper: CDPruner (2506.10967), conditional DPP with the fast greedy MAP inference of Chen et al. (2018).
    Differs: for LLaVA paper and release measure relevance in CLIP's joint space, with a text encoder that no LLaVA checkpoint
        holds (`with_clip` takes one); the embeddings of the language model itself are for models without such an encoder, and
        that the default here is exactly the paper's for those could not be confirmed. The release turns CLIP's relevance around
        (tokens least like the text count most), which `with_clip` does too; and it scales relevance over all tiles of a batch
        at once, which would let one row depend on the others: here over each picture. Newline tokens stay in both.
    """

    def __init__(self, keep: float = 64 / 576, *, relevance: Relevance | None = None) -> None:
        super().__init__(keep)
        if relevance is not None and not callable(relevance):
            raise ValueError(f"CDPruner(relevance={relevance!r}): give a function of the prompt that returns [b t]")
        self.relevance = relevance

    @classmethod
    def with_clip(cls, clip: Any, text: Any, keep: float = 64 / 576) -> CDPruner:
        """With relevance in CLIP's joint space, as paper and release have it for LLaVA: minus the mean cosine of a token to the text.

        Args:
            clip: the CLIP model (vision tower, its last norm and projection) that the model's own tower came from, in any precision.
            text: what `clip.get_text_features` gives for the question of each row, `[b c]`, or for the parts of a long one,
                `[b m c]`; one row stands for all.
            keep: share of each picture's tokens that stays.

        Raises:
            ValueError: (on a prompt) questions for another number of rows.
        """
        features: Tensor = getattr(text, "pooler_output", text)
        parts = features if features.ndim == 3 else features.unsqueeze(1)

        def relevance(view: PromptView) -> Tensor:
            if len(parts) not in (1, view.tokens.batch):
                raise ValueError(
                    f"CDPruner.with_clip was given text for {len(parts)} rows, and the prompt has {view.tokens.batch}: give each row "
                    "its text; beams and several answers repeat rows, and so must text.repeat_interleave(copies, 0)"
                )
            weight = clip.visual_projection.weight
            states = clip.visual_projection(clip.vision_model.post_layernorm(view.encoder_states().to(weight)))
            unit = [torch.nn.functional.normalize(x.float(), dim=-1) for x in (states, parts.to(states.device))]
            view.spend(2 * states.numel() * weight.shape[1])
            return -(unit[0] @ unit[1].mT).mean(2).to(view.embeds.device)

        return cls(keep, relevance=relevance)

    @property
    def looks_at_encoder(self) -> tuple[int | float | None, ...]:  # type: ignore[override]
        """Where a function for relevance is given, it may."""
        return () if self.relevance is None else (None,)

    def arguments(self) -> dict[str, Any]:
        """The share alone, where relevance is the default."""
        return super().arguments() if self.relevance is not None else {"keep": self.keep}

    def choose(
        self, view: PromptView, layout: ImageSpan, rows: Int[Tensor, " p"], index: Int[Tensor, "p n"], count: int
    ) -> Int[Tensor, "p count"]:
        """The most probable subset."""
        states = torch.nn.functional.normalize(rows_at(view.embeds, rows, index).detach().float(), dim=-1)
        pictures, size, width = states.shape
        view.spend(2 * pictures * size * (size * width + count * count // 2))
        relevance = rows_at((self.relevance or relevance_of_words)(view), rows, index).detach().float()
        least, most = relevance.aminmax(dim=1, keepdim=True)
        relevance = (relevance - least + EPSILON) / (most - least).clamp(min=EPSILON)
        return most_probable(states @ states.mT, relevance, count)

    def __repr__(self) -> str:
        """As constructed."""
        return f"CDPruner({self.keep:g}{'' if self.relevance is None else ', relevance=...'})"


def relevance_of_words(view: PromptView) -> Float[Tensor, "b t"]:
    """The mean cosine of each token's embedding to those of the row's text (all of it, where none is behind the picture)."""
    unit = torch.nn.functional.normalize(view.embeds.detach().float(), dim=-1)
    text, system = view.tokens.of(Group.TEXT), view.tokens.of(Group.SYSTEM)
    words = torch.where(text.any(1, keepdim=True), text, system)
    view.spend(2 * unit.numel())
    mean = (unit * words[..., None]).sum(1) / words.sum(1, keepdim=True).clamp(min=1)
    return (unit @ mean[..., None]).squeeze(-1)


def most_probable(
    similarity: Float[Tensor, "p n n"], relevance: Float[Tensor, "p n"], count: int
) -> Int[Tensor, "p count"]:
    """Greedy MAP inference of the DPP with kernel `diag(relevance) similarity diag(relevance)`, in the order of finding.

    Relevance scales determinants alone, so the factor is that of the similarity, whose diagonal is 1: rounding is then equally
    large for all tokens. A token that is a mixture of chosen ones adds nothing but rounding; of those the most relevant come first.

    Paper: Chen, Zhang and Zhou (1709.05135), algorithm 1: the Cholesky factor grows by one row a step.
    """
    pictures, size, _ = similarity.shape
    each = torch.arange(pictures, device=similarity.device)
    gain = similarity.diagonal(dim1=1, dim2=2).clone()
    factor = similarity.new_zeros(pictures, count, size)
    weight = relevance.square()
    chosen = []
    for step in range(count):
        pick = (weight * gain.clamp(min=ROUNDING)).argmax(1)
        chosen.append(pick)
        known = (factor[each, :step, pick].unsqueeze(1) @ factor[:, :step]).squeeze(1)
        own = gain[each, pick].unsqueeze(1)
        row = (similarity[each, pick] - known) * own.clamp(min=ROUNDING).rsqrt()
        factor[:, step] = torch.where(own > ROUNDING, row, 0)
        gain = gain - factor[:, step].square()
        weight = weight.scatter(1, pick[:, None], float("-inf"))
    return torch.stack(chosen, dim=1)
