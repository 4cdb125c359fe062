"""`token_classes`: which picture tokens of a checkpoint are sinks, which are dead and which alive, found from data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from sparing.anatomy import anatomy_of, fingerprint
from sparing.lens.class_report import hubs_of, notes_on, quantiles, share, sublayer, words_of
from sparing.lens.token_evidence import Evidence, Progress, consistency, difference_of, measure, robust_z
from sparing.tokens import TokenProfile
from sparing.tokens.profile import CLASSES, Anchor

FEWEST = 8
"""Pictures: a median over fewer others says little."""
MOST = 4096
"""Tokens that are put into clusters; of more, so many are drawn."""


@dataclasses.dataclass(frozen=True)
class Criteria:
    """When a token counts as what. The defaults are the paper's where it says one, and robust statistics' customs otherwise.

    Attributes:
        alike: least cosine to the nearest token of another picture, in the median over other pictures, of a sink (the paper's
            0.99).
        alike_centred: the same with the mean of all tokens taken off, of any token that does not depend on the picture. It
            keeps models whose tokens all lie in one narrow cone from being called dead.
        outlier: least robust z of the encoder's feature norm of a ViT sink (3.5: the usual cut of the modified z-score).
        begin: least cosine to the begin token, after some sublayer, of an LLM sink.
        stands_out: by how much it must exceed the median of tokens that depend on the picture.
        smallest: least share of all tokens that a cluster must have.
        pictures: least share of the pictures that it must occur in.
        hub: least share of all tokens whose nearest word is one and the same, to be told of.
        different: least share of the pictures' contrast that must lie between them (see `token_classes`).
    """

    alike: float = 0.99
    alike_centred: float = 0.9
    outlier: float = 3.5
    begin: float = 0.9
    stands_out: float = 0.3
    smallest: float = 0.002
    pictures: float = 0.5
    hub: float = 0.05
    different: float = 0.1


def token_classes(
    model: nn.Module,
    processor: Any,
    pictures: Sequence[Image],
    *,
    question: str = "What is in the picture?",
    rule: Literal["anchors", "release"] = "anchors",
    words: Mapping[str, Iterable[int]] | None = None,
    criteria: Criteria | None = None,
    seed: int = 0,
    batch: int = 4,
    compare: int = 24,
    on_step: Progress | None = None,
) -> TokenProfile:
    """Find how the picture tokens of a checkpoint fall into classes, on pictures of your own. Nothing is known beforehand.

    1. A token *does not depend on the picture* if it comes again in other pictures: of each other picture its nearest
       token before the first layer counts, and the median of these cosines, centred by the mean of all tokens, must reach
       `criteria.alike_centred`.
    2. Such tokens fall into clusters (the token with the most others near it leads one, and so on). A cluster must be in
       half of the pictures.
    3. A cluster whose features stand out in the vision encoder by their norm is a *ViT sink*. One that turns towards the
       prompt's first token after some sublayer, while tokens that depend on the picture do not, is an *LLM sink*; it can be
       both. Sinks must come again nearly unchanged (`criteria.alike`). A cluster with neither sign is *dead*: it says nothing of
       the picture and takes no part as a sink.
    4. Each cluster becomes an anchor: its mean direction, and a cosine halfway between its tokens and the others.

    What has no cluster is alive. If a class does not exist, the profile has no anchor for it, a share of 0, and a note that
    says what was looked for and what was seen.

    Args:
        model: a vision-language model of a known family, in eval mode.
        processor: its own.
        pictures: at least 8, better 50, and different ones: of the contrast of their pixels at least `criteria.different` must
            lie between them.
        question: asked about each; what comes after the picture changes nothing here.
        rule: `anchors`, or `release`: a token belongs to a class if any of its three nearest words is one of the class's
            (EmbedLens' rule). Their ids are those that most tokens of a cluster share and few others have.
        words: with `release`: the ids, class -> ids, instead.
        criteria: when a token counts as what.
        seed: of what is drawn: pictures to compare with, and tokens to cluster where there are very many.
        batch: pictures that run together.
        compare: how many other pictures each token is compared with, at most.
        on_step: is told how far it is.

    Returns:
        The profile. `found` has the settings, the hubs of the vocabulary and the shares picture by picture, each anchor its evidence:
        consistency, z of the encoder's norms, cosine to the begin token by sublayer, how much it changes from level to level.

    Raises:
        ValueError: a text-only model, one in training mode, too few pictures or ones that are alike, something that is no
            picture, an unknown rule or class, a criterion out of range, or states that are not finite.

    Paper: EmbedLens (2603.00510): sinks come again with a cosine above 0.99, ViT sinks are CLIP's patches of high norm, LLM
        sinks turn to the begin token after the second MLP; dead tokens are the largest cluster.
    Differs: the release has no discovery, only ids of LLaVA-1.5-7B. The paper does not say over which pictures the cosine is
        taken: here the median over others, centred where it decides about dead tokens. Any cluster that does not depend on the
        picture and is no sink is dead, not only the largest.
    """
    criteria = Criteria() if criteria is None else criteria
    _check(model, pictures, rule, words, criteria, batch, compare)
    evidence = measure(model, processor, pictures, question, batch=batch, on_step=on_step)
    generator = torch.Generator().manual_seed(seed)
    raw, centred = consistency(evidence, compare=compare, generator=generator)
    z = robust_z(evidence.norms)
    label = _clusters(evidence, centred >= criteria.alike_centred, criteria, len(pictures), generator)
    profile = TokenProfile(fingerprint(model), _anchors(evidence, raw, centred, z, label, criteria))
    told = profile.classify(evidence.states)
    assert isinstance(told, Tensor)
    profile = dataclasses.replace(profile, words=words_of(evidence, told))
    vocabulary = anatomy_of(model).decoder.embed_tokens.weight.detach()
    if rule == "release":
        profile = profile.by_words(words)
        told = profile.classify(evidence.states, vocabulary=vocabulary)
        assert isinstance(told, Tensor)
    every = profile.classify(evidence.states, overlapping=True, vocabulary=vocabulary)
    assert isinstance(every, dict)
    tokenizer = getattr(processor, "tokenizer", processor)
    hubs = hubs_of(evidence, told, criteria.hub, tokenizer.convert_ids_to_tokens)
    by_picture = [told[evidence.picture == p] for p in range(len(pictures))]
    return dataclasses.replace(
        profile,
        shares={name: share(told == i) for i, name in enumerate(CLASSES)},
        overlapping={name: share(mask) for name, mask in every.items()},
        notes=tuple(notes_on(profile, evidence, raw, centred < criteria.alike_centred, z, hubs, criteria)),
        found={
            "model": str(anatomy_of(model).config.model_type),
            "pictures": len(pictures),
            "tokens": len(evidence.states),
            "question": question,
            "seed": seed,
            "compare": compare,
            "criteria": dataclasses.asdict(criteria),
            "difference_of_pictures": round(difference_of(pictures), 4),
            "consistency": quantiles(raw),
            "consistency_centred": quantiles(centred),
            "encoder_norms": quantiles(evidence.norms),
            "outlying_norms": share(z >= criteria.outlier),
            "to_begin": [round(v, 4) for v in evidence.to_begin.median(0).values.tolist()],
            "stays": [round(v, 4) for v in evidence.stays.median(0).values.tolist()],
            "hubs": hubs,
            "by_picture": {
                name: quantiles(torch.tensor([share(part == i) for part in by_picture]))
                for i, name in enumerate(CLASSES)
            },
            "words": {name: [tokenizer.convert_ids_to_tokens(i) for i in ids] for name, ids in profile.words.items()},
        },
    )


def _check(
    model: nn.Module,
    pictures: Sequence[Image],
    rule: str,
    words: Mapping[str, Iterable[int]] | None,
    criteria: Criteria,
    batch: int,
    compare: int,
) -> None:
    anatomy = anatomy_of(model)
    if anatomy.vision_encoder is None:
        raise ValueError(
            f"{anatomy.config.model_type} reads text alone, and has no picture tokens: choose a vision-language model"
        )
    if model.training:
        raise ValueError("token_classes needs the model in eval mode: call model.eval() first")
    if isinstance(pictures, Image) or not all(isinstance(picture, Image) for picture in pictures):
        raise ValueError("expected a list of PIL pictures: open files with PIL.Image.open, and give several")
    if len(pictures) < FEWEST:
        raise ValueError(
            f"classes are told by what comes again in other pictures: give at least {FEWEST} pictures (better 50), got {len(pictures)}"
        )
    if rule not in ("anchors", "release"):
        raise ValueError(f"no rule is called {rule!r}: choose 'anchors' or 'release'")
    if words is not None and rule != "release":
        raise ValueError("words= are ids for rule='release'; the rule 'anchors' finds its own")
    if batch < 1 or compare < 2:
        raise ValueError(f"expected batch >= 1 and compare >= 2, got {batch} and {compare}")
    for name, value in dataclasses.asdict(criteria).items():
        if not (0 <= value <= 1 or (name == "outlier" and value > 0)):
            raise ValueError(f"Criteria({name}={value}): expected a number between 0 and 1 (outlier: above 0)")
    if (found := difference_of(pictures)) < criteria.different:
        raise ValueError(
            f"the pictures are almost one and the same ({found:.1%} of their contrast is between them): what comes again in all "
            "of them says nothing then; give different pictures"
        )


def _clusters(
    evidence: Evidence, candidate: Bool[Tensor, " n"], criteria: Criteria, pictures: int, generator: torch.Generator
) -> Int[Tensor, " n"]:
    """Which cluster a token is of; -1 for none. The token with the most candidates near it leads the first, and so on."""
    label = torch.full_like(evidence.picture, -1)
    centre = evidence.states.mean(0)
    index = candidate.nonzero().flatten()
    if len(index) > MOST:
        index = index[torch.randperm(len(index), generator=generator)[:MOST].to(index.device)].sort().values
    states = normalize(evidence.states - centre, dim=1)
    near = states[index] @ states[index].T >= criteria.alike_centred
    left = torch.ones(len(index), dtype=torch.bool, device=near.device)
    count = 0
    while bool(left.any()):
        sizes = (near & left).sum(1).masked_fill(~left, -1)
        lead = int(sizes.argmax())
        if int(sizes[lead]) < max(2.0, criteria.smallest * len(label) * len(index) / max(1, int(candidate.sum()))):
            break
        # All tokens of the leader's neighbourhood, those that were not drawn too.
        members = candidate & (label < 0) & (states @ states[index[lead]] >= criteria.alike_centred)
        left &= ~near[lead]
        seen = len(evidence.picture[members].unique())
        if seen >= criteria.pictures * pictures and int(members.sum()) >= criteria.smallest * len(label):
            label[members] = count
            count += 1
    return label


def _anchors(
    evidence: Evidence, raw: Tensor, centred: Tensor, z: Tensor, label: Tensor, criteria: Criteria
) -> tuple[Anchor, ...]:
    found = []
    depends = label < 0
    usual = evidence.to_begin[depends].median(0).values if bool(depends.any()) else evidence.to_begin.new_zeros(1)
    for cluster in range(int(label.max()) + 1):
        mine = label == cluster
        begin = evidence.to_begin[mine].median(0).values
        turned = ((begin >= criteria.begin) & (begin - usual >= criteria.stands_out)).nonzero().flatten().tolist()
        norm = float(z[mine].nanmedian())
        signs = [name for name, sign in (("vit_sink", norm >= criteria.outlier), ("llm_sink", bool(turned))) if sign]
        alike = float(raw[mine].median())
        classes = tuple(signs) if signs and alike >= criteria.alike else () if signs else ("dead",)
        if not classes:
            continue
        direction = normalize(evidence.states[mine].mean(0), dim=0)
        cosine = evidence.states @ direction
        found.append(
            Anchor(
                classes,
                tuple(round(x, 7) for x in direction.tolist()),
                round(_boundary(cosine[mine], cosine[depends]), 5),
                {
                    "share": share(mine),
                    "pictures": len(evidence.picture[mine].unique()),
                    "consistency": round(alike, 5),
                    "consistency_centred": round(float(centred[mine].median()), 5),
                    "encoder_norm_z": None if norm != norm else round(norm, 2),
                    "length": round(float(evidence.lengths[mine].median()), 4),
                    "turns_to_begin_after": [sublayer(i) for i in turned],
                    "to_begin": [round(v, 4) for v in begin.tolist()],
                    "stays": [round(v, 4) for v in evidence.stays[mine].median(0).values.tolist()],
                    "cosine_of_its_own": quantiles(cosine[mine]),
                    "cosine_of_others": quantiles(cosine[depends]),
                },
            )
        )
    return tuple(found)


def _boundary(own: Float[Tensor, " n"], others: Float[Tensor, " m"]) -> float:
    """Halfway between a cluster's cosines and the others'.

    The lowest percent of the former and the highest 0.1% of the latter are left out. Where the rest overlaps, it is the cosine with
    the fewest errors, as shares of either side.
    """
    low = float(own.quantile(0.01))
    high = float(others.topk(max(1, len(others) // 1000)).values[-1]) if len(others) else -1.0
    if high < low:
        return (low + high) / 2
    tried = own.sort().values
    wrong = (torch.searchsorted(tried, tried) / len(own)) + (
        1 - torch.searchsorted(others.sort().values, tried) / len(others)
    )
    return float(tried[wrong.argmin()])
