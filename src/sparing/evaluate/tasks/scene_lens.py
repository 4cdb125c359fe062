"""What lenses read off the visual tokens of scenes, against the truth of every patch and against nulls."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparing.anatomy import anatomy_of, ask
from sparing.evaluate import statistics
from sparing.evaluate.task import Figure, NotApplicable, Outcome, Progress, Subject, Task
from sparing.evaluate.tasks.scenes import check_speaks
from sparing.evaluate.tasks.writing import as_figure
from sparing.lens import (
    Recording,
    WordReading,
    embedding_lens,
    layer_alignment,
    linear_probe,
    logit_lens,
    norm_matched,
    precision_at_k,
    record,
    shuffled,
    untrained_projector,
)
from sparing.tokens import Group
from sparing.worlds.grids import GridScene, GridWorld
from sparing.worlds.opening import scene_files, scene_world

AT_ONCE = 16
TOP = 5
QUESTION = "what colour is background ?"
PARTS = {"colour": 2, "kind": 3}
"""Parts of a patch that a lens should name: where they stand in `GridScene.patch_words`."""


@dataclasses.dataclass(frozen=True)
class SceneLensTask(Task):
    """How often a lens names what an object's patch shows (`sparing.worlds.scenes`), among all words of the vocabulary.

    Figures, all shares over the patches that show an object, with bootstrap intervals over pictures: the kind (shape or letter)
    and the colour among the top 5 (and top 1) of the embedding lens before the first layer, and at every level; the same by
    the centred and the CSLS variant and by the logit lens; nulls: random vectors of the same norms, patches of the same picture
    exchanged, an untrained projector; the ceiling: a linear probe. `alignment`: the level of the words that visual tokens are
    most like.

    The question asked is always the same and comes after the picture, so that no visual token has seen it. Policies of the subject are
    not applied: a lens looks at the model itself.

    Attributes:
        scenes: pictures to read.
        split: `validation` or `test`.
        draw: seed of the scenes.
        data: a folder of real digits and photographs to make the scenes of; drawn ones by default.
    """

    scenes: int = 64
    split: Literal["validation", "test"] = "test"
    draw: int = 1
    data: Path | None = None

    def check(self) -> None:
        """Look at the settings."""
        scene_world(self.data)
        if self.scenes < 2:
            raise ValueError(f"scenes={self.scenes}: expected at least 2")

    def files(self) -> tuple[Path, ...]:
        """What the scenes are made of."""
        return scene_files(self.data)

    def work(self, subject: Subject) -> float | None:
        """Tokens of the pictures: read, exchanged, through an untrained projector, and as many for the probe."""
        return float(4 * self.scenes * 110)

    @property
    def seeded(self) -> bool:
        """The nulls are drawn."""
        return True

    def measure(self, subject: Subject, *, seed: int, on_step: Progress | None = None) -> Outcome:
        """Read, and compare with the truth."""
        self.check()
        tell = on_step or (lambda done, word: None)
        world = scene_world(self.data)
        check_speaks(subject, world)
        drawn = list(itertools.islice(world.stream(self.split, self.draw), self.scenes))
        marks = _Marks(subject, drawn)
        tell(0.05, f"{len(drawn)} scenes")
        seen = _recorded(subject, world, drawn)
        model = subject.model
        marks.put("", embedding_lens(model, seen, k=TOP))
        tell(0.3, "nulls")
        first = seen.only(levels=[0])
        for variant in ("centred", "csls"):
            marks.put(f" ({variant})", embedding_lens(model, seen, k=TOP, variant=variant), each=False)
        marks.put(" (logit lens)", logit_lens(model, seen, k=TOP))
        marks.put(" (null: random)", embedding_lens(model, norm_matched(first, seed), k=TOP), each=False)
        marks.put(" (null: exchanged)", embedding_lens(model, shuffled(first, seed), k=TOP), each=False)
        with untrained_projector(model, seed):
            blank = _recorded(subject, world, drawn, levels=[0])
        marks.put(" (null: untrained projector)", embedding_lens(model, blank, k=TOP), each=False)
        tell(0.6, "probe")
        other = list(itertools.islice(world.stream("train", self.draw), self.scenes))
        for part, right in _probed(subject, world, first, marks, other, seed).items():
            marks.items[f"{part} by probe"] = right
        figures = {
            name: as_figure(statistics.mean(list(items.values()), seed=seed), "higher", "share")
            for name, items in marks.items.items()
        }
        tell(0.85, "alignment")
        found, details = _alignment(subject, world, first, marks, seed)
        return Outcome({**figures, **found}, marks.items, {"norms": _norms(subject, seen), **details})


class _Marks:
    """Which objects' patches a reading names rightly, as a share a picture."""

    def __init__(self, subject: Subject, drawn: Sequence[GridScene]) -> None:
        words = subject.tokenizer.get_vocab()
        told = [scene.patch_words() for scene in drawn]
        self.truth = {
            part: torch.tensor([words[patch[place]] for scene in told for patch in scene])
            for part, place in PARTS.items()
        }
        self.object = torch.tensor([patch[3] != drawn[0].kinds[0] for scene in told for patch in scene])
        self.picture = torch.arange(len(drawn)).repeat_interleave(len(told[0]))
        self.items: dict[str, dict[str, float]] = {}

    def put(self, what: str, reading: WordReading, *, each: bool = True) -> None:
        """Keep a reading's marks: before the first layer, and at each level."""
        for part, truth in self.truth.items():
            for k in (TOP, 1):
                right = precision_at_k(reading, truth, k)
                for level, marks in zip(reading.levels, right, strict=True):
                    if level == 0:
                        self.items[f"{part} in top {k}{what}"] = self.by_picture(marks)
                    if each and k == TOP:
                        self.items[f"{part} in top {k}{what}, level {level}"] = self.by_picture(marks)

    def by_picture(self, right: Tensor) -> dict[str, float]:
        """The share of each picture's objects."""
        found = {}
        for picture in self.picture.unique().tolist():
            mine = self.object & (self.picture == picture)
            if mine.any():
                found[str(picture)] = float(right.cpu()[mine].float().mean())
        return found


def _recorded(
    subject: Subject, world: GridWorld, drawn: Sequence[GridScene], levels: Sequence[int] | None = None
) -> Recording:
    """The visual tokens of scenes, in reading order."""
    parts = []
    for start in range(0, len(drawn), AT_ONCE):
        part = drawn[start : start + AT_ONCE]
        inputs = ask(subject.model, subject.processor, [QUESTION] * len(part), [[world.picture(s)] for s in part])
        parts.append(record(subject.model, inputs, where=Group.IMAGE, levels=levels))
    wrong = [len(part.index) for part in parts if len(part.index) % 100]
    if wrong:
        raise NotApplicable("a lens on scenes needs a model with one visual token a patch, 100 a picture")
    return dataclasses.replace(parts[0], **_joined(parts))


def _joined(parts: Sequence[Recording]) -> dict[str, Any]:
    """Batches in one: rows go on counting, and the map is that of all rows (which have the same length)."""
    tokens, rows, index = parts[0].tokens, 0, []
    for number, part in enumerate(parts):
        index.append(part.index + torch.tensor([rows, 0]))
        rows += part.tokens.batch
        if number:
            tokens = dataclasses.replace(
                tokens,
                group=torch.cat([tokens.group, part.tokens.group]),
                position_ids=torch.cat([tokens.position_ids, part.tokens.position_ids]),
                images=tokens.images + part.tokens.images,
                ids=None if tokens.ids is None or part.tokens.ids is None else torch.cat([tokens.ids, part.tokens.ids]),
            )
    return {"tokens": tokens, "index": torch.cat(index), "states": torch.cat([part.states for part in parts], 1)}


def _probed(
    subject: Subject, world: GridWorld, first: Recording, marks: _Marks, other: Sequence[GridScene], seed: int
) -> dict[str, dict[str, float]]:
    """What a linear probe, trained on other scenes, gets out of the same states."""
    learned = _Marks(subject, other)
    states = _recorded(subject, world, other, levels=[0]).at(0)[learned.object]
    found = {}
    for part, truth in marks.truth.items():
        named = linear_probe(
            states, learned.truth[part][learned.object], first.at(0)[marks.object], truth[marks.object], seed=seed
        )
        right = torch.zeros(len(truth), dtype=torch.bool)
        right[marks.object] = named.right.cpu()
        found[part] = marks.by_picture(right)
    return found


def _alignment(
    subject: Subject, world: GridWorld, first: Recording, marks: _Marks, seed: int
) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Which level's words visual tokens are most like: patches by kind and by colour against the words in questions."""
    words = [*world.kinds[1:], *world.colours]
    ids = subject.tokenizer.get_vocab()
    states, twins, names = [], [], []
    for word in words:
        part = "colour" if word in world.colours else "kind"
        mine = marks.object & (marks.truth[part] == ids[word])
        if int(mine.sum()) < 2:
            continue
        states.append(first.at(0)[mine].float().mean(0))
        twins.append(_contexts(subject, word, words))
        names.append(word)
    if len(names) < 8:
        return {}, {"alignment": f"only {len(names)} words with two patches or more: read more scenes"}
    found = layer_alignment(torch.stack(states), torch.stack(twins, 1), k=5, seed=seed)
    details = {
        "words": names,
        **{
            name: {
                "scores": measure.scores.tolist(),
                "null mean": measure.null_mean.tolist(),
                "null 95%": measure.null_quantile(0.95).tolist(),
                "p": measure.p.tolist(),
                "peak": measure.peak,
            }
            for name, measure in (("knn", found.knn), ("cka", found.cka))
        },
    }
    figures = {
        f"alignment ({name}), level {level}": Figure(float(score))
        for name, measure in (("knn", found.knn), ("cka", found.cka))
        for level, score in zip(measure.levels, measure.scores, strict=True)
    }
    return figures, {"alignment": details}


def _contexts(subject: Subject, word: str, words: Sequence[str]) -> Tensor:
    """`[levels d]`, what the model makes of a word, the mean over questions that hold it."""
    # Each question with the place of the word: the last one before `?`, or the one it begins with.
    forms: tuple[Callable[[str], str], ...] = (
        lambda w: f"how many {w} ?",
        lambda w: f"where is {w} ?",
        lambda w: f"where is {w} from {next(other for other in words if other != w)} ?",
    )
    states = []
    for form in forms:
        question = form(word)
        inputs = subject.tokenizer(question, return_tensors="pt").to(subject.model.device)
        place = inputs["input_ids"][0].tolist().index(subject.tokenizer.get_vocab()[word])
        where = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        where[0, place] = True
        states.append(record(subject.model, dict(inputs), where=where).states[:, 0].float())
    return torch.stack(states).mean(0)


def _norms(subject: Subject, seen: Recording) -> dict[str, Any]:
    """Median norms of visual tokens at every level, and of words."""
    words = anatomy_of(subject.model).model.get_input_embeddings().weight.detach().float().norm(dim=1)
    return {
        "visual, by level": seen.states.float().norm(dim=-1).median(dim=1).values.tolist(),
        "words": float(words.median()),
    }
