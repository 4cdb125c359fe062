"""What the classes of picture tokens are told by: measured on pictures, one batch at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from sparing.anatomy import anatomy_of, ask
from sparing.lens.record import record
from sparing.tokens import TokenMap
from sparing.tokens.profile import nearest_words

Progress = Callable[[float, str], None]
"""Is told the share that is done, and a word on it."""
SIDE = 16
"""Pictures are compared with each other at this size."""


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
    """What was measured of every picture token, newlines left out.

    Attributes:
        states: unit vectors before the first layer.
        lengths: of the states there.
        picture: which picture a token is of.
        norms: how large the encoder's feature behind it is; NaN where the family cannot tell.
        to_begin: cosine to the prompt's first token (the begin token, where there is one), after attention and after the MLP of
            each layer in turn.
        stays: cosine between each level and the next.
        begins: whether prompts begin with a token that is no picture's.
        nearest: ids of the three nearest words, nearest first.
    """

    states: Float[Tensor, "n d"]
    lengths: Float[Tensor, " n"]
    picture: Int[Tensor, " n"]
    norms: Float[Tensor, " n"]
    to_begin: Float[Tensor, "n sublayers"]
    stays: Float[Tensor, "n layers"]
    begins: bool
    nearest: Int[Tensor, "n k"]


@torch.no_grad()
def measure(
    model: nn.Module,
    processor: Any,
    pictures: Sequence[Image],
    question: str,
    *,
    batch: int,
    on_step: Progress | None,
) -> Evidence:
    """Run every picture once, with a question.

    Raises:
        ValueError: (see `ask`), or states that are not finite.
    """
    anatomy: Any = anatomy_of(model)
    words = normalize(anatomy.decoder.embed_tokens.weight.detach().float(), dim=1)
    parts: list[dict[str, Tensor]] = []
    begins = True
    for start in range(0, len(pictures), batch):
        group = pictures[start : start + batch]
        found, starts_with_text = _of_batch(model, processor, group, question)
        begins &= starts_with_text
        found["picture"] += start
        found["nearest"] = nearest_words(found["states"], words, min(3, len(words)))[1]
        parts.append(found)
        if on_step is not None:
            on_step((start + len(group)) / len(pictures), f"{start + len(group)} of {len(pictures)} pictures")
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    lengths = whole["states"].norm(dim=1)
    whole["states"] = normalize(whole["states"], dim=1)
    return Evidence(**whole, lengths=lengths, begins=begins)


def _of_batch(
    model: nn.Module, processor: Any, pictures: Sequence[Image], question: str
) -> tuple[dict[str, Tensor], bool]:
    anatomy = anatomy_of(model)
    inputs = ask(model, processor, [question] * len(pictures), [[picture] for picture in pictures])
    tokens = TokenMap.from_inputs(model, inputs)
    shown = torch.zeros(tokens.group.shape, dtype=torch.bool)
    for row, spans in enumerate(tokens.images):
        for span in spans:
            shown[row, span.encoded()] = True
    first = tokens.valid.int().argmax(1).cpu()
    kept = shown.clone()
    kept[torch.arange(len(kept)), first] = True
    features: list[Any] = []
    assert anatomy.vision_encoder is not None
    hook = anatomy.vision_encoder.register_forward_hook(lambda _, __, out: features.append(out))
    try:
        seen = record(model, inputs, where=kept, middle=True)
    finally:
        hook.remove()
    assert seen.middle is not None
    row, place = seen.index.T.cpu()
    mine = shown[row, place].to(seen.states.device)
    begin = (place == first[row]).nonzero().flatten().to(seen.states.device)[row].to(seen.states.device)
    if not bool(seen.states.isfinite().all()):
        raise ValueError(
            "the model's states are not finite: it holds NaN or infinite weights, or overflows in this precision"
        )
    to_begin, stays = [], []
    for level in range(seen.depth):
        for states in (seen.middle[level], seen.states[level + 1]):
            to_begin.append(cosine_similarity(states.float(), states[begin].float(), dim=1)[mine])
        stays.append(cosine_similarity(seen.states[level].float(), seen.states[level + 1].float(), dim=1)[mine])
    return {
        "states": seen.at(0)[mine].float(),
        "picture": row.to(mine.device)[mine],
        "norms": _norms(anatomy, features, inputs, tokens, shown),
        "to_begin": torch.stack(to_begin, 1),
        "stays": torch.stack(stays, 1),
    }, not bool(shown[torch.arange(len(shown)), first].any())


def _norms(anatomy: Any, features: list[Any], inputs: Mapping[str, Any], tokens: TokenMap, shown: Tensor) -> Tensor:
    """Of the tokens that are `shown`, in order."""
    norms = anatomy.feature_norms(features[-1], inputs) if features else None
    image = anatomy.is_image_token(inputs["input_ids"])
    device = image.device
    if norms is None:
        return torch.full((int(shown.sum()),), float("nan"), device=device)
    spread = torch.full(tokens.group.shape, float("nan"), device=device)
    spread[image] = norms.to(device)
    return spread[shown.to(device)]


def consistency(
    evidence: Evidence, *, compare: int, generator: torch.Generator, chunk: int = 2048
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """How surely each token comes again in other pictures: as it is, and with what all tokens share taken off.

    Of each other picture the nearest token counts, and of these cosines the median: a token that comes again in some
    pictures (those with the same background) is not one that comes again in all.

    Args:
        evidence: of some pictures.
        compare: how many other pictures to look at, at most.
        generator: which ones.
        chunk: tokens at a time.
    """
    device = evidence.states.device
    count = int(evidence.picture.max()) + 1
    others = torch.randperm(count, generator=generator)[: compare + 1].tolist()
    centred = normalize(evidence.states - evidence.states.mean(0), dim=1)
    found = []
    for states in (evidence.states, centred):
        nearest = torch.full((len(states), len(others)), float("nan"), device=device)
        for column, other in enumerate(others):
            theirs = states[evidence.picture == other]
            for start in range(0, len(states), chunk):
                part = states[start : start + chunk]
                nearest[start : start + chunk, column] = (part @ theirs.T).amax(1)
            nearest[evidence.picture == other, column] = float("nan")
        found.append(nearest.nanmedian(1).values)
    return found[0], found[1]


def robust_z(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """`0.6745 (x - median) / MAD`, the modified z-score; NaN stays. A spread below 0.1% of the median counts as that."""
    known = values[~values.isnan()]
    if not len(known):
        return values
    middle = known.median()
    spread = (known - middle).abs().median().clamp(min=1e-3 * float(middle.abs()) + 1e-12)
    return 0.6745 * (values - middle) / spread


def difference_of(pictures: Sequence[Image]) -> float:
    """How much of the pictures' contrast is between them: 0 if all are one picture, about 1 if they share nothing."""
    small = [picture.convert("RGB").resize((SIDE, SIDE)) for picture in pictures]
    pixels = torch.stack([torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8) for one in small]).float()
    every = pixels.unflatten(1, (-1, 3)).var((0, 1), correction=0).sum()
    between = pixels.unflatten(1, (-1, 3)).var(0, correction=0).mean(0).sum()
    return float(between / every) if every > 0 else 0.0
