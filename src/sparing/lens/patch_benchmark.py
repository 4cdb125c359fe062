"""`patch_benchmark`: what a model can say about one object in one visual token, asked and read with a lens."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from PIL.Image import Image
from torch import Tensor, nn

from sparing.anatomy import ask
from sparing.lens.embedding_lens import Variant, embedding_lens
from sparing.lens.patches.geometry import QUESTION, Geometry, View, find_geometry
from sparing.lens.patches.items import GROUPS, PatchGroup, PatchItem, contact_sheet, draw, make_items
from sparing.lens.patches.wording import Wording, wording_for

WORDS = ("kind", "colour")
"""What the lens looks for in an object's token: its shape or character, and its colour."""
NOT_FOUND = -1
UNKNOWN = -2

Writer = Callable[[dict[str, Tensor]], list[str]]
"""Answers a batch of prompts."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        text: all of it.
        named: the first of the possible answers that is in it; `None` if none is.
        right: that is the right one.
        exact: the text is the right answer and nothing else (capitals and signs at its ends aside).
    """

    text: str
    named: str | None
    right: bool
    exact: bool


@dataclasses.dataclass(frozen=True, eq=False)
class PatchBenchmark:
    """Items, what was answered and what was read, item by item.

    Shares come as (right, asked), to be given an interval by whoever reports them.

    Attributes:
        geometry: which pixels one token covers.
        wording: how it was asked.
        items: pictures and questions.
        tokens: of each item, the original indices of each object's tokens in the prompt `ask` makes of the picture: those whose
            pixels differ from the bare background's, scaled-down overviews aside. One, or one in each view of the same size.
        answers: what was written, item by item; empty if nothing was asked.
        identified: what was written to the question which shape it is; `None` where that is the item's own question.
        levels: which levels the lens read; empty if it read nothing.
        found: at which place, from 0, the lens names the object: items' objects in order, by level and by `WORDS`. `NOT_FOUND` is
            not among the `k` first; `UNKNOWN`, the tokenizer has no one token for the word.
        k: words a token and level.
    """

    geometry: Geometry
    wording: Wording
    items: tuple[PatchItem, ...]
    tokens: tuple[tuple[tuple[int, ...], ...], ...]
    answers: tuple[Answer, ...]
    identified: tuple[Answer | None, ...]
    levels: tuple[int, ...]
    found: Int[Tensor, "objects levels words"]
    k: int

    @property
    def groups(self) -> tuple[PatchGroup, ...]:
        """The groups that were asked."""
        return tuple(dict.fromkeys(item.group for item in self.items))

    def right(self, group: PatchGroup | None = None, *, exact: bool = False) -> tuple[int, int]:
        """Right answers and questions, of a group or of all."""
        marks = [
            answer.exact if exact else answer.right
            for item, answer in zip(self.items, self.answers, strict=bool(self.answers))
            if group in (None, item.group)
        ]
        return sum(marks), len(marks)

    def chance(self, group: PatchGroup | None = None) -> float:
        """How often a guess is right, of a group or of all."""
        levels = [item.chance for item in self.items if group in (None, item.group)]
        return sum(levels) / len(levels)

    def given_identified(self, group: PatchGroup) -> tuple[int, int]:
        """Right answers and questions of a group, among the pictures whose shape was named rightly.

        Paper: EmbedLens (2603.00510): once the object is identified, its colour and number mostly are too.
        """
        marks = [
            answer.right
            for item, answer, shape in zip(self.items, self.answers, self.identified, strict=bool(self.answers))
            if item.group == group and shape is not None and shape.right
        ]
        return sum(marks), len(marks)

    def named_background(self) -> tuple[int, int]:
        """How often the background's colour was named for the object's, of the conflicts.

        Paper: EmbedLens (2603.00510): answers about colour lean on the background.
        """
        pairs = [
            (item, answer)
            for item, answer in zip(self.items, self.answers, strict=bool(self.answers))
            if item.group == "conflict"
        ]
        return sum(answer.named == item.background for item, answer in pairs), len(pairs)

    def read(
        self, word: str, group: PatchGroup | None = None, *, level: int | None = 0, k: int | None = None
    ) -> tuple[int, int]:
        """Objects in whose token the lens names the right word, and objects whose word it could name.

        Args:
            word: `kind` or `colour`.
            group: of the items; all by default.
            level: where; `None`: at any level.
            k: among how many words; all that were read by default.

        Raises:
            ValueError: no such word, a level that was not read, or more words than were read.
        """
        k = self.k if k is None else k
        if word not in WORDS:
            raise ValueError(f"word={word!r}: expected {' or '.join(WORDS)}")
        if not 1 <= k <= self.k:
            raise ValueError(f"k={k}: expected 1 to {self.k}, the words that were read")
        if level is not None and level not in self.levels:
            raise ValueError(f"level {level} was not read; read were {', '.join(map(str, self.levels)) or 'none'}")
        mine = torch.tensor([group in (None, item.group) for item in self.items for _ in item.objects])
        places = self.found[mine, :, WORDS.index(word)]
        places = places[(places != UNKNOWN).all(1)]
        if level is not None:
            places = places[:, [self.levels.index(level)]]
        hit = ((places >= 0) & (places < k)).any(1)
        return int(hit.sum()), len(hit)

    def pictures(self) -> list[Image]:
        """The pictures, drawn again: they follow from the items."""
        return [draw(item, self.geometry) for item in self.items]

    def save_pictures(self, folder: Path | str) -> Path:
        """Writes every picture as a PNG, and all together as `sheet.png`; returns the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        pictures = self.pictures()
        for place, (item, picture) in enumerate(zip(self.items, pictures, strict=True)):
            picture.save(folder / f"{place:04d}-{item.group}-{item.answer}.png")
        contact_sheet(pictures).save(folder / "sheet.png")
        return folder


def patch_benchmark(
    model: nn.Module,
    processor: Any,
    *,
    items: int = 70,
    seed: int = 0,
    groups: Sequence[PatchGroup] = GROUPS,
    wording: Wording | None = None,
    generate: bool = True,
    lens: bool = True,
    k: int = 10,
    levels: Iterable[int] | None = None,
    variant: Variant = "cosine",
    batch: int = 8,
    max_new_tokens: int = 8,
    write: Writer | None = None,
    on_step: Callable[[float], None] | None = None,
) -> PatchBenchmark:
    """Draws objects into exactly one visual token each, asks about them, and reads their tokens with the embedding lens.

    Pictures have the size that the model's own processor passes on pixel by pixel (`Geometry`), and for every picture it is
    checked that the pixels of the object's tokens differ from the bare background's, and no others.

    Args:
        model: a Hugging Face vision-language model, in eval mode; policies of `sparing.apply` act on its answers.
        processor: its own.
        items: how many; groups take turns.
        seed: of what is drawn.
        groups: which (see `PatchItem`).
        wording: words and questions; plain English where the tokenizer has its words, or else those of the scenes world.
        generate: ask.
        lens: read. Not inside `sparing.apply(..., execute="gathered")`, which calls no layer as a whole.
        k: words that the lens gives a token and level.
        levels: which levels it reads; all by default.
        variant: its score (see `embedding_lens`).
        batch: rows of a batch.
        max_new_tokens: longest answer.
        write: answers a batch of prompts, instead of the model's greedy `generate`.
        on_step: is told the share that is done.

    Raises:
        ValueError: a model without pictures, a processor that scales all sizes, too few cells for the counts, a tokenizer
            without the words, no items, or nothing to do.

    Paper: EmbedLens (2603.00510), the patch-compression benchmark: 70 pictures with one object or character in one patch.
    Differs: the paper's pictures and questions are not published. These are drawn, for any model's merged patches.
    """
    if not generate and not lens:
        raise ValueError("generate=False, lens=False: nothing is left to do")
    geometry = find_geometry(model, processor)
    tokenizer = processor.tokenizer
    if wording is None:
        wording = wording_for(tokenizer)
    elif not wording.known_to(tokenizer):
        raise ValueError("the tokenizer lacks words of this wording: give one in its own words, or none")
    made = make_items(items, geometry, wording, seed=seed, groups=groups)
    views = _Views(model, processor, geometry)
    tokens = tuple(views.tokens(item) for item in made)
    levels = None if levels is None else tuple(levels)
    asked = [(place, item.question) for place, item in enumerate(made)] if generate else []
    asked += [(place, item.identify) for place, item in enumerate(made) if generate and item.identify]
    passes = len(asked) + lens * len(made)
    done = 0

    def tell(number: int) -> None:
        nonlocal done
        done += number
        if on_step is not None:
            on_step(done / passes)

    texts: list[str] = []
    for first in range(0, len(asked), batch):
        part = asked[first : first + batch]
        inputs = _prompts(
            model, processor, [question for _, question in part], [made[place] for place, _ in part], geometry
        )
        texts += write(inputs) if write else _greedy(model, tokenizer, inputs, max_new_tokens)
        tell(len(part))
    answers = tuple(_answer(text, item.answer, item.options, wording) for text, item in zip(texts, made, strict=False))
    shapes = dict(zip((place for place, _ in asked[len(made) :]), texts[len(made) :], strict=True))
    identified = tuple(
        _answer(shapes[place], item.objects[0].kind, wording.objects, wording) if place in shapes else None
        for place, item in enumerate(made)
    )
    read: list[Tensor] = []
    kept: tuple[int, ...] = ()
    for first in range(0, len(made) if lens else 0, batch):
        part = made[first : first + batch]
        found, kept = _read(
            model,
            processor,
            part,
            tokens[first : first + batch],
            geometry,
            wording,
            k=k,
            levels=levels,
            variant=variant,
        )
        read.append(found)
        tell(len(part))
    return PatchBenchmark(
        geometry=geometry,
        wording=wording,
        items=tuple(made),
        tokens=tokens,
        answers=answers,
        identified=identified if generate else (),
        levels=kept,
        found=torch.cat(read) if read else torch.empty(0, 0, len(WORDS), dtype=torch.long),
        k=k,
    )


class _Views:
    """Pictures as the encoder gets them, each against its bare background."""

    def __init__(self, model: nn.Module, processor: Any, geometry: Geometry) -> None:
        self.model, self.processor, self.geometry = model, processor, geometry
        self._bare: dict[str, View] = {}

    def tokens(self, item: PatchItem) -> tuple[tuple[int, ...], ...]:
        """Each object's tokens.

        Raises:
            ValueError: its pixels are in other tokens too, or in none of its own.
        """
        if item.background not in self._bare:
            self._bare[item.background] = self._view(dataclasses.replace(item, objects=()))
        bare = self._bare[item.background]
        whole = self._seen(bare.changed(self._view(item)))
        parts = []
        for thing in item.objects:
            one = whole if len(item.objects) == 1 else self._seen(bare.changed(self._view(_alone(item, thing))))
            if not bool(one.any()) or bool((one.sum((1, 2)) > 1).any()):
                raise ValueError(
                    f"{thing} is in {int(one.sum())} tokens: the processor treats this picture unlike others"
                )
            parts.append(one)
        together = torch.stack(parts)
        if bool((together.sum(0) > 1).any()) or not torch.equal(together.any(0), whole):
            raise ValueError(f"the objects of {item} do not lie in tokens of their own")
        return tuple(tuple(bare.places(one)) for one in parts)

    def _view(self, item: PatchItem) -> View:
        return View(self.model, self.processor, draw(item, self.geometry))

    def _seen(self, changed: Tensor) -> Tensor:
        """Without the scaled-down views of the whole picture."""
        changed = changed.clone()
        for tile in self.geometry.overviews:
            changed[tile] = False
        return changed


def _alone(item: PatchItem, thing: Any) -> PatchItem:
    return dataclasses.replace(item, objects=(thing,))


def _prompts(
    model: nn.Module, processor: Any, questions: Sequence[str], items: Sequence[PatchItem], geometry: Geometry
) -> dict[str, Tensor]:
    return ask(model, processor, questions, [[draw(item, geometry)] for item in items])


@torch.inference_mode()
def _greedy(model: nn.Module, tokenizer: Any, inputs: Mapping[str, Tensor], most: int) -> list[str]:
    pad = tokenizer.pad_token_id
    out = model.generate(  # type: ignore[operator]
        **inputs, do_sample=False, max_new_tokens=most, pad_token_id=0 if pad is None else pad
    )
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _answer(text: str, right: str, options: Sequence[str], wording: Wording) -> Answer:
    """Marks an answer by the first of the possible ones in it; black and white are possible where colours are."""
    possible = [*options, *(wording.grounds if set(options) <= set(wording.colours) else ())]
    spelled = {spelling.lower(): word for word in possible for spelling in wording.spellings(word)}
    spelled |= {wording.plural(word).lower(): word for word in options if len(word) > 1}
    words = [word.strip(string.punctuation) for word in text.lower().split()]
    named = next((spelled[word] for word in words if word in spelled), None)
    whole = text.strip().strip(string.punctuation).strip().lower()
    return Answer(text, named, named == right, spelled.get(whole) == right)


def _read(
    model: nn.Module,
    processor: Any,
    items: Sequence[PatchItem],
    tokens: Sequence[tuple[tuple[int, ...], ...]],
    geometry: Geometry,
    wording: Wording,
    *,
    k: int,
    levels: Iterable[int] | None,
    variant: Variant,
) -> tuple[Int[Tensor, "objects levels words"], tuple[int, ...]]:
    """Where the lens names each object's words, in its tokens."""
    # One question for all, so that nothing is padded and a token has the same index in every prompt.
    inputs = _prompts(model, processor, [QUESTION] * len(items), items, geometry)
    where = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    for row, things in enumerate(tokens):
        where[row, [place for places in things for place in places]] = True
    reading = embedding_lens(model, inputs, k=k, levels=levels, where=where, variant=variant)
    at = {tuple(pair): number for number, pair in enumerate(reading.index.tolist())}
    ids = reading.ids.cpu()
    found = []
    for row, (item, things) in enumerate(zip(items, tokens, strict=True)):
        for thing, places in zip(item.objects, things, strict=True):
            mine = ids[:, [at[row, place] for place in places]]
            found.append(
                torch.stack(
                    [_place(mine, _forms(processor.tokenizer, word)) for word in (thing.kind, thing.colour)], -1
                )
            )
    return torch.stack(found), reading.levels


def _forms(tokenizer: Any, word: str) -> list[int]:
    """The tokens that are the word: with a space in front or not, small or capital."""
    found = set()
    for form in {word, word.capitalize(), word.upper() if len(word) == 1 else word}:
        for text in (form, f" {form}"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
                found.add(ids[0])
    return sorted(found)


def _place(ids: Int[Tensor, "levels n k"], forms: list[int]) -> Int[Tensor, " levels"]:
    """The first place of a word's tokens, at each level, in the best of some visual tokens."""
    if not forms:
        return torch.full((len(ids),), UNKNOWN)
    hit = torch.isin(ids, torch.tensor(forms)).any(1)
    return torch.where(hit.any(-1), hit.int().argmax(-1), NOT_FOUND)
