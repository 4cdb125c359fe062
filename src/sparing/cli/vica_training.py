"""What `sparing vica train` does: a model and its policy, stages with their data, the training, and what came of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparing.cli.options import places_of
from sparing.cli.progress import step_bar
from sparing.cli.vica_conversion import (
    Wanted,
    check_wanted,
    convert_model,
    material_for,
    print_conversion,
    print_figures,
    report,
)

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from sparing.cli.vica_conversion import Converted
    from sparing.policies import ViCA
    from sparing.train import Conversation, Fit, Optimisation, Stage, TrainingRecipe

SCENE_STEPS = 100
"""Steps on drawn scenes, which have no end, where none are given."""


@dataclasses.dataclass(frozen=True)
class Own:
    """The settings of a training without a recipe; see the command's options."""

    data: Path | None
    pictures: Path | None
    stages: Literal["tune", "llava"]
    lora: int
    steps: int | None
    epochs: float
    batch: int
    at_once: int | None
    lr: float | None
    projector_lr: float
    warmup: float
    max_length: int | None

    def how(self) -> Optimisation:
        """The optimiser's settings, of the last stage.

        Raises:
            ValueError: one of them is out of range.
        """
        from sparing.train import Optimisation

        lr = (2e-4 if self.lora else 2e-5) if self.lr is None else self.lr
        return Optimisation(self.steps, self.epochs, self.batch, self.at_once, lr, self.warmup)

    def made(self, conversations: Sequence[Conversation], source: str) -> list[Stage]:
        """What is trained on some data."""
        from sparing.train import Lora, Stage

        how, lora = self.how(), Lora(self.lora, 2 * self.lora) if self.lora else None
        last = Stage("language", ("projector", "language"), how, conversations, source, self.max_length, lora)
        if self.stages == "tune":
            return [dataclasses.replace(last, name="tune")]
        first = dataclasses.replace(how, lr=self.projector_lr)
        return [Stage("projector", ("projector",), first, conversations, source, self.max_length), last]


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that the command was told."""

    model: str | None
    recipe: Path | None
    paths: tuple[str, ...]
    shrink: bool
    wanted: Wanted | None
    otherwise: Wanted
    own: Own
    save_every: int
    workers: int
    seed: int
    device: str
    dtype: Literal["auto", "float32", "bfloat16"]
    out: Path

    def config(self) -> dict[str, Any]:
        """For the record."""
        return dataclasses.asdict(self)

    @functools.cached_property
    def recipe_told(self) -> TrainingRecipe:
        """What the recipe says, read once."""
        from sparing.train import read_recipe

        assert self.recipe is not None
        return read_recipe(self.recipe)

    def stages(self, processes: int) -> list[Stage]:
        """What is trained on what, as far as it is known before a model is loaded: drawn data comes later.

        Raises:
            ValueError: settings out of range, data that is not there or is wrong.
            ModuleNotFoundError: adapters are wanted, and PEFT is not installed.
        """
        from sparing.train import ConversationFile

        places = places_of(self.paths)
        if self.recipe is not None:
            stages = [] if self.shrink else self.recipe_told.made(self.recipe.parent, places)
        else:
            own = self.own
            data = () if own.data is None else ConversationFile(own.data, own.pictures)
            stages = own.made(data, str(own.data))
        for stage in stages:
            stage.how.shared(processes)
            if stage.lora is not None:
                import peft  # noqa: F401
        return stages


def run_job(job: Job) -> None:
    """Train, save and report.

    Raises:
        ValueError: whatever is wrong with settings, model or data.
        Interrupted: after Ctrl-C; a checkpoint is kept.
    """
    from rich.console import Console

    from sparing.checkpoint.writing import check_target
    from sparing.cli.profile import check_out
    from sparing.cli.record import RunRecord

    # What `torchrun` and `accelerate launch` tell each process they start.
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for wanted in (job.wanted, job.otherwise):
        if wanted is not None:
            check_wanted(wanted)
    # Before anything is loaded or chosen: what is wrong with settings and data is told at once.
    stages = job.stages(processes)
    check_out(job.out)
    check_target(job.out)
    if job.model is not None and Path(job.model).is_dir() and Path(job.model).resolve() == job.out.resolve():
        raise ValueError(f"--out {job.out} is the model's own folder, whose weights would be lost: name another one")
    console = Console(quiet=rank > 0)
    with contextlib.ExitStack() as stack:
        record = None
        if rank == 0:
            record = stack.enter_context(RunRecord(job.out, config=job.config(), seed=job.seed))
        model, processor, saved = _loaded(job, processes)
        stages = _with_data(stages, job, processor, rank)
        if processes > 1:
            console.print(f"{processes} processes share each step", highlight=False)
        policy, converted = _policy(job, model, processor, saved, console, processes)
        if record is not None:
            record.figures["policy"] = repr(policy)
            record.figures |= {} if converted is None else converted.about
        fits = _trained(job, model, processor, policy, stages, console)
        if record is not None:
            _end(job, model, processor, policy, converted, stages, fits, record, console)


def _policy(
    job: Job, model: nn.Module, processor: Any, saved: tuple, console: Console, processes: int
) -> tuple[ViCA, Converted | None]:
    """What it is trained under, and what the conversion found out."""
    from sparing.anatomy import anatomy_of
    from sparing.policies import ViCA

    given = [policy for policy in saved if isinstance(policy, ViCA)]
    if len(saved) != len(given):
        raise ValueError(f"{job.model} follows {' & '.join(map(repr, saved))}: this trains under ViCA alone")
    if job.recipe is not None:
        policy = _recipe_policy(job, model)
        policy.validate(anatomy_of(model).shape())
        return policy, None
    if given and job.wanted is not None:
        raise ValueError(f"{job.model} reads in layers {list(given[0].layers)} already: leave --layers out")
    if given and processes > 1:
        return given[0], None
    wanted = job.wanted or job.otherwise
    if given:
        wanted = dataclasses.replace(wanted, layers=",".join(map(str, given[0].layers)), prefix=str(given[0].prefix))
    if processes > 1:
        if (layers := wanted.read_layers()) is None:
            raise ValueError(
                "layers are chosen in one process: sparing vica convert first, then train what it saved, or give --layers 0,1,7"
            )
        policy = ViCA(layers, wanted.read_prefix())
        policy.validate(anatomy_of(model).shape())
        return policy, None
    with step_bar("converting", console) as tell:
        found = convert_model(model, processor, wanted, measurements=job.out / "measurements.jsonl", on_step=tell)
    if not given:
        print_conversion(found, anatomy_of(model).shape().depth, console)
    return found.policy, found


def _loaded(job: Job, processes: int) -> tuple[nn.Module, Any, tuple]:
    """The model in float32, on the CPU where several processes will each put it on a device of their own; processor, policies."""
    from sparing.anatomy.shrinking import load_shrunk
    from sparing.cli.models import load_model
    from sparing.cli.options import device_of
    from sparing.evaluate.reading_layers import check_sees
    from sparing.study.bench import resolved
    from sparing.study.shrinking import stand_in
    from sparing.train.beginning import forget_projector, take_language

    where = device_of(job.device)
    if where.type == "cuda" and where.index not in (None, 0):
        raise ValueError(f"--device {job.device}: training runs on the first GPU it sees; set CUDA_VISIBLE_DEVICES")
    device = "cpu" if processes > 1 else job.device
    if job.recipe is None:
        assert job.model is not None
        model, processor, saved = load_model(job.model, device=device)
        check_sees(model)
        _note_dtype(model)
        return model.float(), processor, saved
    recipe = job.recipe_told
    if job.shrink:
        model, processor = load_shrunk(stand_in(recipe.model, resolved, recipe.like), seed=job.seed)
        model = model.to(device_of(device))
        saved = ()
    else:
        model, processor, saved = load_model(recipe.model, device=device)
        if recipe.language is not None:
            take_language(model, load_model(recipe.language, device="cpu")[0])
    check_sees(model)
    _note_dtype(model)
    if "projector" in recipe.fresh:
        forget_projector(model, job.seed)
    return model.float(), processor, saved


def _note_dtype(model: Any) -> None:
    """What the checkpoint is kept in, before it is trained in float32."""
    model.config.dtype = model.dtype


def _recipe_policy(job: Job, model: nn.Module) -> ViCA:
    from sparing.anatomy import anatomy_of
    from sparing.policies import ViCA

    entry = job.recipe_told.vica
    layers, prefix = entry.layers, entry.prefix
    if job.shrink:
        last = anatomy_of(model).shape().depth - 1
        layers = tuple(layer for layer in layers if layer <= last) or (0,)
        prefix = min(prefix, last) if isinstance(prefix, int) else prefix
    return ViCA(layers, prefix)


def _with_data(stages: list[Stage], job: Job, processor: Any, rank: int) -> list[Stage]:
    """The same with drawn data, where there is no other."""
    from sparing.train import DrawnConversations, speaks_scenes

    if job.shrink:
        # Each process writes the same for itself, so that none reads what another one is writing.
        return job.recipe_told.shrunk(job.out / "training" / (f"data-{rank}" if rank else "data"), job.seed)
    if job.recipe is not None or job.own.data is not None:
        return stages
    if not speaks_scenes(processor):
        raise ValueError(
            "nothing to train on: give --data FILE, conversations in LLaVA's format (docs/vica_training.md)"
        )
    drawn = DrawnConversations((job.own.steps or SCENE_STEPS) * job.own.batch, job.seed)
    return [dataclasses.replace(stage, conversations=drawn, source="drawn scenes") for stage in stages]


def _trained(job: Job, model: Any, processor: Any, policy: ViCA, stages: list[Stage], console: Console) -> list[Fit]:
    import torch

    from sparing.train import train_stages

    dtype = job.dtype
    if job.recipe is not None and dtype == "auto" and not job.shrink:
        dtype = job.recipe_told.dtype
    fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    with step_bar("training", console) as tell, _quiet():
        return train_stages(
            model,
            processor,
            [policy],
            stages,
            job.out / "training",
            seed=job.seed,
            autocast=dtype == "bfloat16" or (dtype == "auto" and fast and job.device != "cpu"),
            save_every=job.save_every,
            workers=job.workers,
            on_step=tell,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the Trainer says of its own accord, which would run through the bar."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _end(
    job: Job,
    model: Any,
    processor: Any,
    policy: ViCA,
    converted: Converted | None,
    stages: list[Stage],
    fits: list[Fit],
    record: Any,
    console: Console,
) -> None:
    """Save what was trained, say how fast it went, and ask it the held-out questions."""
    import sparing
    from sparing.evaluate.reading_layers import VisualCost, measurements_of

    told = [
        {
            **stage.as_dict(),
            "steps_done": fit.steps,
            "loss": fit.loss,
            "seconds": fit.seconds,
            "tokens": fit.tokens,
            "tokens_per_second": fit.tokens_per_second if fit.tokens else None,
        }
        for stage, fit in zip(stages, fits, strict=True)
    ]
    record.figures["training"] = told
    for entry in told:
        rate = entry["tokens_per_second"]
        speed = "done by an earlier run" if rate is None else f"{rate:.0f} tokens/s in {entry['seconds']:.0f} s"
        console.print(
            f"{entry['name']}: {entry['steps_done']} steps, loss {entry['loss']:.3f}, {speed}", highlight=False
        )
    kept = model.config.dtype
    if kept is not None and kept != model.dtype:
        # What is measured is what is saved.
        model.to(kept).float()
    material = converted.material if converted is not None else material_for(model, processor, job.otherwise)
    figures: dict[str, Any] = {"notes": []} if converted is None else dict(converted.figures)
    if material is not None and material.ready:
        with step_bar("asking", console) as tell:
            after = report(material, measurements_of(material), {"trained": (policy,)}, tell)
        figures = _joined({**figures, "visual_share": VisualCost(material).share(policy.layers)}, after)
        figures["questions"] = len(material.asked("report"))
        print_figures(figures, console)
        record.figures |= {key: figures[key] for key in ("loss", "right", "right_interval", "answers")}
    about = {"selection": _selection(job, converted), "training": told}
    about |= {key: figures[key] for key in ("loss", "right", "visual_share", "questions", "notes") if key in figures}
    card = {f"loss of held-out answers, {arm}": value for arm, value in figures.get("loss", {}).items()}
    if kept is not None:
        model.to(kept)
    sparing.save(model, job.out, [policy], processor=processor, figures=card, about=about)
    console.print(f"saved: {job.out}", style="bold", soft_wrap=True, highlight=False)


def _joined(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Figures of several arms as one."""
    found = {**before}
    for key in ("loss", "right", "right_interval", "same"):
        found[key] = {**before.get(key, {}), **after[key]}
    rows = before.get("answers") or [{} for _ in after["answers"]]
    found["answers"] = [{**row, **more} for row, more in zip(rows, after["answers"], strict=True)]
    return found


def _selection(job: Job, converted: Converted | None) -> Any:
    """Why these layers: as chosen now, or as the converted checkpoint says."""
    from sparing.checkpoint import about

    if converted is not None and converted.choice is not None:
        return converted.choice.as_dict()
    if job.model is None:
        return None
    try:
        return about(job.model).get("selection")
    except ValueError:
        return None
