"""`sparing vica`: visual tokens that skip every layer and are only read in a few: choose the layers, convert, train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sparing.cli.options import Device, Dtype, Out, RemoteCode, Seed

vica = typer.Typer(
    help="Let visual tokens skip every layer, read by text in a few: choose these layers, convert, train.",
    no_args_is_help=True,
)

Model = Annotated[str, typer.Argument(help="A checkpoint's folder, a hub id, or a model of the zoo.", metavar="MODEL")]
Prefix = Annotated[
    str,
    typer.Option(
        "--prefix",
        help="Attention of what stands before the picture: update, freeze, or the last layer that updates it.",
    ),
]
By = Annotated[
    Literal["greedy", "kl", "cosine"],
    typer.Option(
        "--by",
        help="greedy: lowest loss, layer by layer. kl: where not reading changes outputs most. cosine: where attention turns text.",
    ),
]
Budget = Annotated[
    str, typer.Option("--budget", help="For --layers auto: a number of layers, or a share of the visual FLOPs (5%).")
]
Images = Annotated[
    Path | None,
    typer.Option(
        "--images",
        help="Folder of pictures with a questions.jsonl, to choose and to report on; drawn scenes for a model of the zoo.",
        metavar="DIR",
    ),
]
MaxQuestions = Annotated[
    int, typer.Option("--max-questions", min=1, help="Questions to use: half to choose layers, half to report.")
]
LAYERS = "auto, or layers with commas between them: 0,1,7."


@vica.command()
def convert(
    model: Model,
    layers: Annotated[str, typer.Option("--layers", help=LAYERS)] = "auto",
    prefix: Prefix = "update",
    by: By = "greedy",
    budget: Budget = "5%",
    images: Images = None,
    max_questions: MaxQuestions = 128,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = None,
    out: Out = Path("runs/vica"),
) -> None:
    """Choose the layers that read pictures, and save the model with them, untrained.

    Prints the layers with their scores, the share of the visual FLOPs that is left, and loss and answers before and after on questions
    that did not choose.

    --out becomes a checkpoint that sparing.load reads and stock loading refuses; the scores are in its sparing.json.
    """
    from rich.console import Console

    import sparing
    from sparing.anatomy import anatomy_of
    from sparing.checkpoint.writing import check_target
    from sparing.cli.models import load_model
    from sparing.cli.profile import check_out
    from sparing.cli.progress import step_bar
    from sparing.cli.record import RunRecord
    from sparing.cli.vica_conversion import Wanted, check_wanted, convert_model, print_conversion

    wanted = Wanted(layers, prefix, by, budget, images, max_questions, seed)
    check_wanted(wanted)
    check_out(out)
    check_target(out)
    loaded, processor, saved = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if saved:
        names = " & ".join(map(repr, saved))
        raise ValueError(
            f"{model} follows {names} already: convert the model that it was made from, or sparing.release it"
        )
    config = {"model": model, "layers": layers, "prefix": prefix, "by": by, "budget": budget, "images": images}
    config |= {"max_questions": max_questions, "device": device, "dtype": dtype}
    console = Console()
    with RunRecord(out, config=config, seed=seed) as record:
        with step_bar("converting", console) as tell:
            found = convert_model(loaded, processor, wanted, measurements=out / "measurements.jsonl", on_step=tell)
        record.figures = {"policy": repr(found.policy), **found.about, "answers": found.figures.get("answers", [])}
        sparing.save(loaded, out, [found.policy], processor=processor, figures=found.card, about=found.about)
    print_conversion(found, anatomy_of(loaded).shape().depth, console)
    console.print(f"saved: {out}", style="bold", soft_wrap=True, highlight=False)


@vica.command()
def train(
    model: Annotated[
        str | None,
        typer.Argument(help="A checkpoint, converted or not, a hub id, a model of the zoo, or a recipe's YAML."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="A YAML with model, data and settings; see recipes/.")
    ] = None,
    path: Annotated[
        list[str] | None, typer.Option("--path", help="NAME=FOLDER: another place for one of the recipe's paths.")
    ] = None,
    shrink: Annotated[
        bool, typer.Option("--shrink", help="The recipe with two layers, random weights, two steps and drawn data.")
    ] = False,
    layers: Annotated[
        str | None,
        typer.Option("--layers", help=f"{LAYERS} Those of a converted checkpoint by default, else auto."),
    ] = None,
    prefix: Prefix = "update",
    by: By = "greedy",
    budget: Budget = "5%",
    images: Images = None,
    max_questions: MaxQuestions = 128,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Conversations in LLaVA's format, .jsonl or .json; drawn scenes for a zoo model."),
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option("--pictures", help="Folder of the data's pictures; the data's own by default.")
    ] = None,
    stages: Annotated[
        Literal["tune", "llava"],
        typer.Option("--stages", help="tune: projector and language model. llava: the projector alone first."),
    ] = "tune",
    lora: Annotated[
        int, typer.Option("--lora", min=0, help="Rank of adapters in place of the language model's weights; 0: whole.")
    ] = 0,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Optimiser steps of a stage.")] = None,
    epochs: Annotated[float, typer.Option("--epochs", help="Times through the data, without --steps.")] = 1.0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Conversations a step, over all processes.")] = 8,
    at_once: Annotated[
        int | None, typer.Option("--at-once", min=1, help="Conversations of a forward pass of one process.")
    ] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Peak learning rate; 2e-5, and 2e-4 with --lora.")] = None,
    projector_lr: Annotated[float, typer.Option("--projector-lr", help="Of the first of LLaVA's stages.")] = 1e-3,
    warmup: Annotated[float, typer.Option("--warmup", help="Steps; below 1 a share of them.")] = 0.03,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=1, help="Tokens of a conversation, pictures included.")
    ] = None,
    save_every: Annotated[int, typer.Option("--save-every", min=1, help="Steps between checkpoints.")] = 500,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes that prepare batches.")] = 0,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option("--dtype", help="Compute in; weights stay float32. auto: bfloat16 on a GPU that has it."),
    ] = "auto",
    out: Out = Path("runs/vica-trained"),
) -> None:
    """Train a model under ViCA: convert and fine-tune, or LLaVA's two stages with ViCA in both, or a recipe.

    Only what ViCA computes is computed, forward and backward. Answers alone have a loss.

    --out becomes a checkpoint that sparing.load reads. Ctrl-C leaves one in --out/training, from which the same command goes on.

    On several GPUs: accelerate launch --num_processes 8 -m sparing.cli vica train ...
    """
    from sparing.cli.vica_conversion import Wanted
    from sparing.cli.vica_training import Job, Own, run_job

    if recipe is None and model is not None and Path(model).suffix in (".yaml", ".yml"):
        recipe, model = Path(model), None
    if (recipe is None) == (model is None):
        raise ValueError("give a MODEL, or a recipe (--recipe FILE), and not both")
    if recipe is None and (shrink or path):
        raise ValueError(f"{'--shrink' if shrink else '--path'} is for recipes: give --recipe FILE")
    wanted = None if layers is None else Wanted(layers, prefix, by, budget, images, max_questions, seed)
    otherwise = Wanted("auto", prefix, by, budget, images, max_questions, seed)
    own = Own(
        data=data,
        pictures=pictures,
        stages=stages,
        lora=lora,
        steps=steps,
        epochs=epochs,
        batch=batch,
        at_once=at_once,
        lr=lr,
        projector_lr=projector_lr,
        warmup=warmup,
        max_length=max_length,
    )
    job = Job(
        model=model,
        recipe=recipe,
        paths=tuple(path or ()),
        shrink=shrink,
        wanted=wanted,
        otherwise=otherwise,
        own=own,
        save_every=save_every,
        workers=workers,
        seed=seed,
        device=device,
        dtype=dtype,
        out=out,
    )
    run_job(job)
