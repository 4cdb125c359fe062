"""What `sparing vica convert` and `sparing vica train` share: which layers read, on what they are chosen, what it costs."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from sparing.evaluate import PictureMaterial
    from sparing.evaluate.measurements import Measurements
    from sparing.evaluate.reading_layers import LayerChoice
    from sparing.policies import ViCA

By = Literal["greedy", "kl", "cosine"]
SCENES_PER_TASK = 6
"""Questions of each of the scenes' tasks to choose and to report on, where no pictures are given."""
SHOWN = 4
"""Held-out answers that are printed."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What was asked for.

    Attributes:
        layers: `auto`, or numbers with commas between them.
        prefix: `update`, `freeze`, or the last layer that updates the prefix.
        by: the criterion of `auto`.
        budget: of `auto`: layers, or a share of the visual FLOPs.
        images: a folder with questions.
        questions: most of them to use.
        seed: of drawn scenes.
    """

    layers: str
    prefix: str
    by: By
    budget: str
    images: Path | None
    questions: int
    seed: int

    def read_layers(self) -> tuple[int, ...] | None:
        """The numbers; `None` for `auto`.

        Raises:
            ValueError: something else.
        """
        if self.layers.strip() == "auto":
            return None
        try:
            found = tuple(int(word) for word in self.layers.split(",") if word.strip())
        except ValueError:
            raise ValueError(f"--layers {self.layers}: give auto, or layers with commas between them (0,1,7)") from None
        if not found:
            raise ValueError("--layers names no layer, so the model would be blind: give auto, or layers such as 0,1,7")
        return found

    def read_prefix(self) -> str | int:
        """`update`, `freeze` or a number, as `ViCA` takes it."""
        return int(self.prefix) if self.prefix.isdecimal() else self.prefix


@dataclasses.dataclass(frozen=True, eq=False)
class Converted:
    """A model's policy, and what is known of it.

    Attributes:
        policy: the policy.
        choice: why these layers; `None` where they were given.
        material: what it was measured on; `None` where nothing fits the model.
        store: the material's measurements.
        figures: the numbers, for the record.
    """

    policy: ViCA
    choice: LayerChoice | None
    material: PictureMaterial | None
    store: Measurements | None
    figures: dict[str, Any]

    @property
    def about(self) -> dict[str, Any]:
        """What the checkpoint keeps of the choice."""
        chosen = None if self.choice is None else self.choice.as_dict()
        kept = ("loss", "right", "visual_share", "questions", "notes")
        return {"selection": chosen, **{key: self.figures[key] for key in kept if key in self.figures}}

    @property
    def card(self) -> dict[str, Any]:
        """Single numbers, for the model card."""
        found: dict[str, Any] = {"layers that read pictures": len(self.policy.layers)}
        if "visual_share" in self.figures:
            found["visual FLOPs, share of dense"] = self.figures["visual_share"]
        for name, key in (("loss of held-out answers", "loss"), ("right held-out answers", "right")):
            found |= {f"{name}, {arm}": value for arm, value in self.figures.get(key, {}).items() if value is not None}
        return found


def check_wanted(wanted: Wanted) -> None:
    """Look at what can be wrong before a model is loaded.

    Raises:
        ValueError: see `Wanted`, `ViCA`, `Budget` and `read_questions`.
    """
    from sparing.evaluate import read_questions
    from sparing.evaluate.reading_layers import Budget
    from sparing.policies import ViCA

    ViCA(wanted.read_layers() or (), wanted.read_prefix())
    if wanted.read_layers() is None and Budget.of(wanted.budget) == Budget(layers=0):
        raise ValueError("--budget 0 reads pictures in no layer, so the model would be blind: give at least 1")
    if wanted.images is not None:
        read_questions(wanted.images, wanted.questions)


def convert_model(
    model: nn.Module,
    processor: Any,
    wanted: Wanted,
    *,
    measurements: Path | None,
    on_step: Callable[[float, str], None],
) -> Converted:
    """Choose layers if that is asked for, and measure what the policy costs on questions that did not choose.

    Raises:
        ValueError: a text model, layers that it lacks, nothing to choose on, weights that are NaN.
    """
    from sparing.anatomy import anatomy_of
    from sparing.evaluate.reading_layers import (
        Budget,
        VisualCost,
        added_features,
        check_sees,
        choose_layers,
        measurements_of,
    )
    from sparing.policies import ViCA

    check_sees(model)
    anatomy, layers, choice = anatomy_of(model), wanted.read_layers(), None
    policy = ViCA(layers or (), wanted.read_prefix())
    policy.validate(anatomy.shape())
    material = material_for(model, processor, wanted)
    if material is None:
        if layers is None:
            raise ValueError(
                "--layers auto needs pictures to choose on: give --images DIR, a folder with a questions.jsonl (docs/profile.md)"
            )
        return Converted(policy, None, None, None, {"notes": _notes(added_features(anatomy))})
    store = measurements_of(material, measurements)
    if not material.ready:
        material.prepare(store, on_step)
    material.check()
    if layers is None:
        choice = choose_layers(
            material,
            wanted.by,
            Budget.of(wanted.budget),
            prefix=wanted.read_prefix(),
            seed=wanted.seed,
            store=store,
            on_step=on_step,
        )
        policy = choice.policy()
    figures = {
        "visual_share": VisualCost(material).share(policy.layers),
        "questions": len(material.asked("report")),
        "notes": _notes(added_features(anatomy)),
        **report(material, store, {"dense": (), "ViCA": (policy,)}, on_step),
    }
    return Converted(policy, choice, material, store, figures)


def material_for(model: nn.Module, processor: Any, wanted: Wanted) -> PictureMaterial | None:
    """Questions in the model's own words: the folder's, or drawn scenes for a model that knows their words."""
    from sparing.evaluate import PictureMaterial, read_questions
    from sparing.evaluate.pictures.drawn import draw_scenes
    from sparing.train import speaks_scenes

    if wanted.images is not None:
        return PictureMaterial(model, processor, read_questions(wanted.images, wanted.questions))
    if not speaks_scenes(processor):
        return None
    with tempfile.TemporaryDirectory() as folder:
        draw_scenes(Path(folder), SCENES_PER_TASK, wanted.seed, "validation")
        return PictureMaterial(model, processor, read_questions(Path(folder), wanted.questions))


def report(
    material: PictureMaterial, store: Measurements, arms: Mapping[str, tuple], on_step: Callable[[float, str], None]
) -> dict[str, Any]:
    """Loss, answers and how many of these are right on the reporting half, for the stock model and others."""
    losses, answers = {}, {}
    for i, (name, policies) in enumerate(arms.items()):
        on_step(i / len(arms), f"{name}: held-out answers")
        said = " & ".join(map(repr, policies)) or "stock"
        losses[name] = store.get(
            f"report | {said}", lambda p=policies: {"loss": material.loss_under("report", *p).mean}
        )["loss"]
        answers[name] = store.get(f"answers | {said}", lambda p=policies: {"texts": material.answers_under(*p)})[
            "texts"
        ]
    first = next(iter(answers))
    compared = {name: material.compare(answers[first], texts) for name, texts in answers.items()}
    right = {name: found["right"]["planned"] for name, found in compared.items()}
    asked = [question.question for question in material.asked("report")]
    return {
        "loss": losses,
        "right": {name: None if share is None else share[0] for name, share in right.items()},
        "right_interval": right,
        "same": {name: found["same"][0] for name, found in compared.items()},
        "answers": [
            {"question": question, "expected": expected, **{name: texts[i] for name, texts in answers.items()}}
            for i, (question, expected) in enumerate(zip(asked, compared[first]["references"], strict=True))
        ],
    }


def print_conversion(found: Converted, depth: int, console: Console) -> None:
    """The layers with their scores, and what they cost."""
    from rich.table import Table

    choice = found.choice
    scores = {} if choice is None else dict(choice.scores)
    cosine = {} if choice is None else dict(choice.cosine)
    table = Table(
        "layer", "reads", *scores, *(f"cos {name}" for name in cosine), title="reading layers", title_justify="left"
    )
    for layer in range(depth):
        order = "" if choice is None or layer not in choice.order else f" ({choice.order.index(layer) + 1})"
        mark = f"[bold]yes{order}[/]" if layer in found.policy.layers else "[dim]·[/]"
        cells = [f"{values[layer]:.4f}" for values in (*scores.values(), *cosine.values())]
        table.add_row(str(layer), mark, *cells)
    console.print(table)
    console.print(f"{found.policy!r}", style="bold", highlight=False)
    print_figures(found.figures, console)


def print_figures(figures: Mapping[str, Any], console: Console) -> None:
    """Visual FLOPs, losses and some answers, one arm beside the other."""
    from rich.table import Table

    for note in figures["notes"]:
        console.print(note, style="yellow", soft_wrap=True, highlight=False)
    if "loss" not in figures:
        console.print("nothing to measure on: --images DIR says what the loss is before and after", style="dim")
        return
    console.print(f"visual FLOPs {figures['visual_share']:.1%} of dense", highlight=False)
    console.print("held-out loss " + _arrows(figures["loss"], "{:.3f}"), highlight=False)
    if any(share is not None for share in figures["right"].values()):
        console.print(f"right answers {_arrows(figures['right'], '{:.0%}')} of {figures['questions']}", highlight=False)
    arms = list(figures["loss"])
    table = Table("question", "expected", *arms, title="held-out answers", title_justify="left")
    for row in figures["answers"][:SHOWN]:
        table.add_row(*(_plain(row[key]) for key in ("question", "expected", *arms)))
    console.print(table)


def _arrows(values: Mapping[str, float | None], form: str) -> str:
    return " → ".join(f"{'–' if value is None else form.format(value)} {name}" for name, value in values.items())


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(" ".join(text.split())[:80])


def _notes(note: str | None) -> list[str]:
    return [] if note is None else [note]
