"""`look`: what a model's visual tokens are, for one question about some pictures. What the page of `sparing look` shows."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparing.anatomy import anatomy_of, ask
from sparing.evaluate.answering import Arm, answers
from sparing.evaluate.pictures.files import OpenedPicture
from sparing.evaluate.pictures.grids import SeenPicture, grids_of
from sparing.lens import Recording, WordReading, embedding_lens, find_words, logit_lens, record
from sparing.lens.words import readable
from sparing.tokens import Group, TokenMap, TokenProfile
from sparing.tokens.profile import CLASSES

READINGS = 600_000
"""Words of one lens that a page can bear: 8 bytes each, both lenses together."""
MAPPED = 1_500_000
"""Cosines of words that can be searched for: a byte each."""
SHOWN = ("alive", "dead", "vit_sink", "llm_sink")
"""Classes in the order in which they are shown."""


@dataclasses.dataclass(frozen=True, eq=False)
class LensWords:
    """What one lens read: the `k` best words of each token at each level.

    Attributes:
        name: of the lens.
        unit: what the scores are.
        ids: token ids, best first.
        scores: their scores.
    """

    name: str
    unit: str
    ids: Int[np.ndarray, "levels n k"]
    scores: Float[np.ndarray, "levels n k"]


@dataclasses.dataclass(frozen=True, eq=False)
class WordMaps:
    """The cosine of every visual token to single words, whether or not these are among its best.

    Attributes:
        ids: token ids of each word, one or several.
        scores: the cosines.
        complete: whether these are all words of the vocabulary.
    """

    ids: tuple[tuple[int, ...], ...]
    scores: Float[np.ndarray, "levels n words"]
    complete: bool


@dataclasses.dataclass(frozen=True, eq=False)
class TokenClasses:
    """What kind of token each visual token is.

    Attributes:
        names: of the classes, those that no token here belongs to included.
        of: `[n]`, which of `names`.
        source: where the classes come from.
        notes: what finding them has to say, such as that a class does not exist in this model.
    """

    names: tuple[str, ...]
    of: Int[np.ndarray, " n"]
    source: str
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """How many tokens there are of each class."""
        return {name: int((self.of == i).sum()) for i, name in enumerate(self.names)}


@dataclasses.dataclass(frozen=True, eq=False)
class Look:
    """What a model's visual tokens are, for one question about some pictures.

    `n` are the visual tokens in the order of the prompt, levels are as in `sparing.lens.record`.

    Attributes:
        model: name, family, layers, parameters, dtype and device.
        question: as asked.
        answer: the model's own.
        prompt_tokens: tokens of the prompt, visual ones included.
        pictures: the grids.
        index: original index of each visual token.
        levels: which levels are kept.
        depth: layers of the model.
        norms: length of the residual stream.
        lenses: what the lenses read.
        words: every token id that occurs, in words.
        maps: which words can be searched for everywhere, with their cosines.
        classes: of the visual tokens.
        arms: answers with all tokens, and without some of them.
        notes: what the reader must know: what was left out, and why.
        seconds: how long looking took.
    """

    model: dict[str, Any]
    question: str
    answer: str
    prompt_tokens: int
    pictures: tuple[SeenPicture, ...]
    index: Int[np.ndarray, " n"]
    levels: tuple[int, ...]
    depth: int
    norms: Float[np.ndarray, "levels n"]
    lenses: tuple[LensWords, ...]
    words: dict[int, str]
    maps: WordMaps
    classes: TokenClasses
    arms: tuple[Arm, ...]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The figures, for `run.json`: not the readings, which the page holds."""
        return {
            "model": self.model,
            "question": self.question,
            "answer": self.answer,
            "prompt_tokens": self.prompt_tokens,
            "pictures": [
                {"name": p.name, "grid": list(p.places.shape), "extra": len(p.extra), "notes": list(p.notes)}
                for p in self.pictures
            ],
            "visual_tokens": len(self.index),
            "levels": list(self.levels),
            "classes": {
                "counts": self.classes.counts,
                "source": self.classes.source,
                "notes": list(self.classes.notes),
            },
            "arms": [dataclasses.asdict(arm) for arm in self.arms],
            "searchable": {"words": len(self.maps.ids), "all": self.maps.complete},
            "notes": list(self.notes),
            "seconds": self.seconds,
        }


def look(
    model: nn.Module,
    processor: Any,
    pictures: Sequence[OpenedPicture],
    question: str,
    profile: TokenProfile,
    *,
    source: str = "As a given profile tells them",
    k: int = 10,
    seeds: int = 3,
    max_new_tokens: int = 24,
    repeats: int = 3,
    on_step: Callable[[str], None] = lambda line: None,
) -> Look:
    """Ask a question about pictures once, and read every visual token with both lenses.

    Args:
        model: a Hugging Face vision-language model of a known family.
        processor: its processor.
        pictures: they go in front of the question, in this order.
        question: without image tokens.
        profile: tells the classes of this model's visual tokens.
        source: where the profile comes from, as a sentence.
        k: words a token and level. Fewer are kept, and then fewer levels, where a page could not bear them; a note says so.
        seeds: random controls of each answer.
        max_new_tokens: most tokens of an answer.
        repeats: timed prefills; 0 for none.
        on_step: called before each part with what it is.

    Raises:
        ValueError: what `ask` refuses, no picture, or a profile of another checkpoint.
    """
    started = time.perf_counter()
    if not pictures:
        raise ValueError("expected a picture to look at, got none")
    profile.check(model)
    on_step("reading the pictures")
    inputs = ask(model, processor, [question], [[picture.image for picture in pictures]])
    anatomy, tokenizer = anatomy_of(model), processor.tokenizer
    tokens = TokenMap.from_inputs(model, inputs)
    visual = int(tokens.of(Group.IMAGE).sum())
    k, levels = _affordable(visual, len(anatomy.layers), min(k, anatomy.vocabulary))
    recording = record(model, inputs, where=Group.IMAGE, levels=levels)
    on_step("reading with the embedding lens")
    embedded = embedding_lens(model, recording, k=k)
    on_step("reading with the logit lens")
    voiced = logit_lens(model, recording, k=k)
    classes = _classes(profile, recording, tokens, anatomy, source)
    counts = {name: n for name, n in classes.counts.items() if name in CLASSES}
    room = anatomy.text_config.max_position_embeddings - tokens.length
    if room < 1:
        raise ValueError(
            f"the prompt's {tokens.length} tokens leave no room for an answer: use fewer or smaller pictures"
        )
    arms = answers(
        model,
        processor,
        inputs,
        profile,
        counts,
        seeds=seeds,
        max_new_tokens=min(max_new_tokens, room),
        repeats=repeats,
        on_step=on_step,
    )
    assert arms[0].answer is not None
    on_step("searching words")
    maps = _maps(model, tokenizer, recording, embedded, f"{question} {arms[0].answer.text}")
    seen = {*embedded.ids.unique().tolist(), *voiced.ids.unique().tolist(), *(i for word in maps.ids for i in word)}
    weight = next(p for p in model.parameters() if p.is_floating_point())
    return Look(
        model={
            "name": getattr(model, "name_or_path", "") or type(model).__name__,
            "family": anatomy.config.model_type,
            "layers": len(anatomy.layers),
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "device": str(weight.device),
        },
        question=question,
        answer=arms[0].answer.text,
        prompt_tokens=tokens.length,
        pictures=tuple(grids_of(model, processor, inputs, tokens, embedded, pictures, question)),
        index=recording.index[:, 1].cpu().numpy(),
        levels=levels,
        depth=len(anatomy.layers),
        norms=embedded.norms.cpu().numpy(),
        lenses=(
            LensWords("embedding lens", "cosine", embedded.ids.cpu().numpy(), embedded.scores.cpu().numpy()),
            LensWords("logit lens", "log-probability", voiced.ids.cpu().numpy(), voiced.scores.cpu().numpy()),
        ),
        words={i: readable(tokenizer, i) for i in seen},
        maps=maps,
        classes=classes,
        arms=arms,
        notes=tuple(_notes(tokenizer, question, visual, k, levels, len(anatomy.layers))),
        seconds=time.perf_counter() - started,
    )


def _affordable(visual: int, depth: int, k: int) -> tuple[int, tuple[int, ...]]:
    """Words and levels that a page can bear: fewer words first, then fewer levels, the first and last among them."""
    k = max(min(k, 3), min(k, READINGS // (visual * (depth + 1)))) if visual else k
    most = max(2, READINGS // max(1, visual * k))
    if most > depth:
        return k, tuple(range(depth + 1))
    return k, tuple(sorted({round(i * depth / (most - 1)) for i in range(most)}))


def _notes(tokenizer: Any, question: str, visual: int, k: int, levels: tuple[int, ...], depth: int) -> Iterator[str]:
    if (unknown := tokenizer.unk_token_id) is not None:
        ids = tokenizer(question, add_special_tokens=False)["input_ids"]
        if missing := ids.count(unknown):
            words = f"{missing} of the question's {len(ids)} words"
            yield f"The tokenizer does not know {words}: the model reads {tokenizer.unk_token} there."
    if len(levels) <= depth:
        yield f"With {visual} visual tokens the page holds {k} words a token at {len(levels)} of {depth + 1} levels."


def _classes(profile: TokenProfile, recording: Recording, tokens: TokenMap, anatomy: Any, source: str) -> TokenClasses:
    """The class of each token; newlines, which show nothing, are told apart from them."""
    words = anatomy.model.get_input_embeddings().weight if profile.rule == "words" else None
    told = profile.classify(recording.at(0), vocabulary=words)
    assert isinstance(told, Tensor)
    encoded = torch.zeros(tokens.length, dtype=torch.bool)
    for span in tokens.images[0]:
        encoded[span.encoded()] = True
    shows = encoded[recording.index[:, 1].cpu()].numpy()
    order = np.array([SHOWN.index(name) for name in CLASSES])
    of = np.where(shows, order[told.cpu().numpy()], len(SHOWN))
    names = SHOWN if shows.all() else (*SHOWN, "newline")
    return TokenClasses(names, of, source, profile.notes)


def _maps(model: nn.Module, tokenizer: Any, recording: Recording, reading: WordReading, text: str) -> WordMaps:
    """Cosines to every word, if a page can bear these; else to those of a text and the most frequent best ones."""
    levels, n, _ = reading.ids.shape
    most, size = MAPPED // max(1, levels * n), anatomy_of(model).vocabulary
    if size <= most:
        ids: list[tuple[int, ...]] = [(i,) for i in range(size)]
    else:
        ids = list(dict.fromkeys(_pieces(tokenizer, text)))[:most]
        best, times = reading.ids[..., 0].flatten().unique(return_counts=True)
        frequent = [(int(i),) for i in best[times.argsort(descending=True)]]
        ids = [*ids, *(one for one in frequent if one not in set(ids))][:most]
    scores = find_words(model, recording, ids).cpu().numpy()
    return WordMaps(tuple(ids), scores, size <= most)


def _pieces(tokenizer: Any, text: str) -> Iterator[tuple[int, ...]]:
    """The words of a text as the tokenizer cuts them, behind a space and without one."""
    for word in re.findall(r"\w+", text):
        for form in (f" {word}", word):
            ids = tuple(tokenizer(form, add_special_tokens=False)["input_ids"])
            # A lone space in front is a piece of its own in some vocabularies, and would blur the mean.
            if ids and tokenizer.unk_token_id not in ids and readable(tokenizer, ids[0]).strip():
                yield ids
