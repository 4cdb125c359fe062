"""What a token profile tells people: shares, hubs of the vocabulary, and why a class is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparing.lens.token_evidence import Evidence
from sparing.tokens import TokenProfile
from sparing.tokens.profile import ALIVE, CLASSES

OWN, OTHERS = 0.5, 0.1
"""A word stands for a class if at least this share of its tokens, and at most that of the living, are near it."""
HUBS = 10
"""At most so many are told of."""


def words_of(evidence: Evidence, told: Int[Tensor, " n"]) -> dict[str, tuple[int, ...]]:
    """Class -> the words that most of its tokens have among their three nearest and few living ones do."""
    size = int(evidence.nearest.max()) + 1
    living = _among(evidence.nearest[told == ALIVE], size)
    found = {}
    for i, name in enumerate(CLASSES[:ALIVE]):
        mine = _among(evidence.nearest[told == i], size)
        good = (mine >= OWN) & (living <= OTHERS)
        ids = mine.masked_fill(~good, 0).topk(min(3, size)).indices
        if kept := tuple(int(j) for j in ids if good[j]):
            found[name] = kept
    return found


def _among(nearest: Tensor, size: int) -> Tensor:
    """Share of tokens that have each word among their nearest."""
    return torch.bincount(nearest.flatten(), minlength=size) / max(1, len(nearest))


def hubs_of(
    evidence: Evidence, told: Int[Tensor, " n"], least: float, spoken: Callable[[int], str]
) -> list[dict[str, Any]]:
    """Words that are the nearest of many tokens, the greatest first, and what these tokens were told to be."""
    first, pictures = evidence.nearest[:, 0], len(evidence.picture.unique())
    found = []
    for word in torch.bincount(first).argsort(descending=True)[:HUBS].tolist():
        mine = first == word
        if share(mine) < least:
            break
        found.append(
            {
                "id": word,
                "word": spoken(word),
                "share": share(mine),
                "pictures": len(evidence.picture[mine].unique()) / pictures,
                "classes": {name: share(told[mine] == i) for i, name in enumerate(CLASSES)},
            }
        )
    return found


def notes_on(
    profile: TokenProfile,
    evidence: Evidence,
    raw: Float[Tensor, " n"],
    depends: Bool[Tensor, " n"],
    z: Float[Tensor, " n"],
    hubs: list[dict[str, Any]],
    criteria: Any,
) -> list[str]:
    """What people should know, in sentences.

    Args:
        profile: what was found.
        evidence: what it was found in.
        raw: how surely each token comes again in other pictures.
        depends: whether it does not, by the criteria.
        z: how far its encoder feature's norm stands out.
        hubs: see `hubs_of`.
        criteria: when a token counts as what.
    """
    found = []
    if not evidence.begins:
        found.append("Prompts begin with the picture: its own first token stands for the begin token.")
    if not profile.has("vit_sink"):
        found.append(f"No ViT sinks: {_no_norms(raw, z, criteria)}.")
    if not profile.has("llm_sink"):
        found.append(f"No LLM sinks: {_no_turn(evidence, depends, criteria)}.")
    if not profile.has("dead"):
        found.append(
            "No dead tokens: none comes again in most other pictures without being a sink (the nearest token of another picture "
            f"has a cosine of {float(raw.median()):.2f} in the median, {float(raw.max()):.3f} at most)."
        )
    if share(~depends) > 0.9:
        found.append(
            f"{share(~depends):.0%} of the tokens come again in other pictures: the encoder passes on little of these "
            "pictures, or they are too much alike for it. Shares mean little then."
        )
    if living := [hub for hub in hubs if hub["classes"]["alive"] > 0.5]:
        hub = living[0]
        found.append(
            f"{hub['share']:.1%} of the tokens, in {hub['pictures']:.0%} of the pictures, have {hub['word']!r} (id {hub['id']}) "
            "as their nearest word, and yet they differ between pictures: a rule by that word would call them dead."
        )
    missing = [name for name in CLASSES[:ALIVE] if profile.has(name) and not profile.words.get(name)]
    if profile.rule == "anchors" and missing:
        found.append(f"No word tells {' and '.join(missing)} tokens from the living: the release's rule cannot.")
    return found


def _no_norms(raw: Tensor, z: Tensor, criteria: Any) -> str:
    if bool(z.isnan().all()):
        return "the family does not say how large the encoder's features are"
    outlying = z >= criteria.outlier
    if not bool(outlying.any()):
        return "no token's encoder feature has an outlying norm"
    differ = share(raw[outlying] < criteria.alike)
    return (
        f"{share(outlying):.1%} of the tokens have encoder features of outlying norm, but {differ:.0%} of these differ between "
        "pictures"
    )


def _no_turn(evidence: Evidence, depends: Tensor, criteria: Any) -> str:
    middle = evidence.to_begin[depends if bool(depends.any()) else slice(None)].median(0).values
    for i, value in enumerate(middle.tolist()):
        if value >= criteria.begin:
            return f"all tokens alike turn to the first one after {sublayer(i)} (cosine {value:.2f} in the median), so none stands out"
    turned = evidence.to_begin.amax(1) >= criteria.begin
    if bool(turned.any()):
        return (
            f"{share(turned):.1%} of the tokens turn to the first one after some sublayer, but they are not alike before the first "
            "layer, where a policy would have to know them"
        )
    return f"no token turns to the first one (cosine {float(evidence.to_begin.max()):.2f} at most)"


def sublayer(index: int) -> str:
    """The name of a column of `Evidence.to_begin`: `attention 0`, `mlp 0`, `attention 1`, ..."""
    return f"{('attention', 'mlp')[index % 2]} {index // 2}"


def share(mask: Bool[Tensor, " n"]) -> float:
    """Of the tokens."""
    return round(float(mask.float().mean()), 6) if mask.numel() else 0.0


def quantiles(values: Float[Tensor, " n"]) -> dict[str, float] | None:
    """Lowest, highest and three between them; `None` where nothing is known."""
    known = values[~values.isnan()].float()
    if not len(known):
        return None
    # `quantile` takes no more than 16 million values.
    known = known[:: max(1, len(known) // 1_000_000)]
    at = known.quantile(torch.tensor([0.0, 0.05, 0.5, 0.95, 1.0], device=known.device)).tolist()
    return dict(zip(("lowest", "p5", "median", "p95", "highest"), (round(v, 5) for v in at), strict=True))
