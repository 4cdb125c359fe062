"""The patch benchmark as a task: one object in one visual token, asked under policies and read with the embedding lens."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from sparing.anatomy import anatomy_of
from sparing.evaluate import statistics
from sparing.evaluate.task import Figure, NotApplicable, Outcome, Progress, Subject, Task
from sparing.evaluate.tasks.metering import Meter
from sparing.evaluate.tasks.writing import as_figure, write
from sparing.lens import PatchBenchmark, patch_benchmark
from sparing.lens.patches.items import GROUPS, PatchGroup

# Answers that the drill-down shows whole.
SHOWN = 20


@dataclasses.dataclass(frozen=True)
class PatchBenchmarkTask(Task):
    """`sparing.lens.patch_benchmark`: objects, colours, counts, characters and colours against the background, one token each.

    Figures: `accuracy` over all items, then each group by its name; `colour_given_object` and the like, among the pictures whose shape
    was named rightly; `background_named`, how often the background's colour was taken for the object's in the conflicts; and with the
    lens `read_kind`, `read_colour` in the object's token as the projector made it, `read_kind_anywhere`, `read_colour_anywhere` at any
    level. Policies act on the answers; the lens reads the model without them. Chance is in the details.

    Attributes:
        items: pictures and questions; groups take turns.
        groups: which of them; all by default.
        draw: seed of what is drawn.
        lens: read the tokens too.
        k: words that the lens gives a token and level.
        batch: rows of a batch.
        max_new_tokens: longest answer.
    """

    items: int = 70
    groups: tuple[PatchGroup, ...] = ()
    draw: int = 0
    lens: bool = True
    k: int = 5
    batch: int = 8
    max_new_tokens: int = 8

    def check(self) -> None:
        """Look at the settings."""
        for name in ("items", "k", "batch", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if strange := [group for group in self.groups if group not in GROUPS]:
            raise ValueError(f"no group is called {strange[0]!r}: expected some of {', '.join(GROUPS)}")

    def measure(self, subject: Subject, *, seed: int, on_step: Progress | None = None) -> Outcome:
        """Ask under the policies, then read without them."""
        self.check()
        anatomy: Any = anatomy_of(subject.model)
        if anatomy.vision_encoder is None:
            raise NotApplicable(
                f"{anatomy.config.model_type} reads text alone: the patch benchmark is made of pictures"
            )
        tell = on_step or (lambda done, word: None)
        drawn: dict[str, Any] = {
            "items": self.items,
            "groups": self.groups or GROUPS,
            "seed": self.draw,
            "batch": self.batch,
        }
        part = 0.5 if self.lens else 1.0
        with subject.applied() as run:
            meter = Meter(run, subject.model)

            def answer(inputs: dict[str, Tensor]) -> list[str]:
                given: dict[str, Any] = dict(inputs)
                ids, mask = given.pop("input_ids"), given.pop("attention_mask")
                written = write(
                    subject.model, subject.tokenizer, meter, ids, mask, max_new_tokens=self.max_new_tokens, **given
                )
                return [subject.tokenizer.decode(list(w.ids), skip_special_tokens=True) for w in written]

            asked = patch_benchmark(
                subject.model,
                subject.processor,
                lens=False,
                write=answer,
                on_step=lambda done: tell(part * done, "answers"),
                **drawn,
            )
        read = None
        if self.lens:
            read = patch_benchmark(
                subject.model,
                subject.processor,
                generate=False,
                k=self.k,
                on_step=lambda done: tell(part + (1 - part) * done, "lens"),
                **drawn,
            )
        return _outcome(asked, read, meter)


def _share(counted: tuple[int, int], better: Any = "higher") -> Figure:
    right, asked = counted
    return as_figure(statistics.share(right, asked), better, "share")


def _outcome(asked: PatchBenchmark, read: PatchBenchmark | None, meter: Meter) -> Outcome:
    marks: dict[str, dict[str, float]] = {"accuracy": {}}
    for place, (item, answer) in enumerate(zip(asked.items, asked.answers, strict=True)):
        marks["accuracy"][f"{place}"] = float(answer.right)
        marks.setdefault(item.group, {})[f"{place}"] = float(answer.right)
    figures = {name: _share((int(sum(scores.values())), len(scores))) for name, scores in marks.items()}
    for group in asked.groups:
        # Without one picture whose shape was named there is nothing to tell.
        if (counted := asked.given_identified(group))[1]:
            figures[f"{group}_given_object"] = _share(counted)
    if (counted := asked.named_background())[1]:
        figures["background_named"] = _share(counted, "lower")
    details: dict[str, Any] = {
        "chance": {"accuracy": asked.chance(), **{group: asked.chance(group) for group in asked.groups}},
        "exact": {group: asked.right(group, exact=True)[0] for group in asked.groups},
        "picture": {"size": list(asked.geometry.size), "cell": list(asked.geometry.cell)},
        "answers": [
            {"item": f"{place}", "prompt": item.question, "gold": item.answer, "answer": answer.text}
            for place, (item, answer) in enumerate(zip(asked.items[:SHOWN], asked.answers, strict=False))
        ],
        "cost": meter.details(),
    }
    if read is not None:
        for word in ("kind", "colour"):
            levels = {level: read.read(word, level=level) for level in read.levels}
            # A tokenizer that has none of the words leaves nothing to read.
            if levels[0][1]:
                figures[f"read_{word}"] = _share(levels[0])
                figures[f"read_{word}_anywhere"] = _share(read.read(word, level=None))
                details[f"read_{word}_by_level"] = {str(level): right / n for level, (right, n) in levels.items()}
    return Outcome({**figures, **meter.figures()}, marks, details)
