"""`sparing eval`: what a model can do, under its policies or others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sparing.cli.options import Device, Dtype, Out, RemoteCode, Seed

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from sparing.evaluate import Outcome, Subject, Task


def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint's folder, a hub id, or a zoo model.", metavar="MODEL")],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            help="Names that lm-eval knows, or YAML files in its form: with commas between them or the option repeated.",
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="JSON",
            help='A task with settings, as JSON or @file: {"kind": "generation", "data": "x.jsonl", "verifier": "math"}. '
            "Kinds: harness, choice, perplexity, generation, lmms and more; see the docs.",
        ),
    ] = None,
    suite: Annotated[
        Literal["vlm"] | None,
        typer.Option(
            "--suite", help="vlm: nine benchmarks with pictures (MME, GQA, MMBench, POPE, ...), asked by lmms-eval."
        ),
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option("--text", help="Also the perplexity of this UTF-8 text, .txt or .gz.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            metavar="JSON",
            help='Policies in place of the saved ones, as JSON or @file: {"SkipModules": {"attention": [3]}}; {} is the stock model.',
        ),
    ] = None,
    execute: Annotated[
        Literal["gathered", "dense"], typer.Option("--execute", help="gathered computes what is planned; dense masks.")
    ] = "gathered",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Documents of each task; all.")] = None,
    fewshot: Annotated[int | None, typer.Option("--fewshot", min=0, help="Examples; as each task has it.")] = None,
    batch: Annotated[
        str, typer.Option("--batch", help="Rows of a batch; auto halves them when memory runs out.")
    ] = "auto",
    scoring: Annotated[
        Literal["auto", "one_pass", "two_pass"],
        typer.Option(
            "--scoring",
            help="Continuations with their context in one pass, or after it, unseen by policies; auto: two where one is not causal.",
        ),
    ] = "auto",
    include: Annotated[
        Path | None,
        typer.Option("--include", file_okay=False, help="Folder of further tasks for lm-eval or lmms-eval."),
    ] = None,
    vlm_python: Annotated[
        Path | None,
        typer.Option(
            "--vlm-python", dir_okay=False, help="The Python of the environment that has lmms-eval; this one."
        ),
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Let verifier: code run programs that the model wrote, under limits.")
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = None,
    out: Out = Path("runs/eval"),
) -> None:
    """Ask a model tasks: what it gets right, how long its answers are, what they cost. With 95% intervals.

    A model that was saved with policies follows them, or those of --policy in their place. Writes run.json, results.json and
    measurements.jsonl to --out. A second run asks only what is not there yet.
    """
    from rich.console import Console

    from sparing.cli.models import load_model
    from sparing.cli.profile import check_out
    from sparing.cli.record import RunRecord, write_json
    from sparing.evaluate import Subject

    check_out(out)
    shared = {"limit": limit, "fewshot": fewshot, "batch": _rows(batch), "include": include, "python": vlm_python}
    shared["scoring"] = scoring
    asked = _tasks(tasks or [], task or [], suite, text or [], shared, allow_code)
    methods = None if policy is None else _policies(policy, execute)
    for each in asked.values():
        each.check()
    loaded, processor, saved = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    subject = Subject(loaded, processor, saved if methods is None else (), execute)
    for method in methods or ():
        subject = method.prepare(subject, seed=seed).subject
    config = {"model": model, "tasks": {name: repr(each) for name, each in asked.items()}}
    config |= {"policies": [repr(p) for p in subject.policies], "execute": execute, "device": device, "dtype": dtype}
    console = Console()
    with RunRecord(out, config=config, seed=seed) as record:

        def keep(found: dict[str, Any]) -> None:
            record.figures = {
                name: {"not_applicable": entry["not_applicable"]} if "not_applicable" in entry else entry["figures"]
                for name, entry in found.items()
            }
            record.write()
            write_json(out / "results.json", found)

        found = _ask(asked, subject, seed, out / "measurements.jsonl", console, keep)
    _print(found, repr_of(subject), console)
    console.print(f"results: {out / 'results.json'}", style="bold", soft_wrap=True, highlight=False)


def repr_of(subject: Subject) -> str:
    """What a subject follows, in one line."""
    return " & ".join(map(repr, subject.policies)) or "no policy: the stock model"


# What the command offers ------------------------------------------------------------------------------------------------


def _rows(batch: str) -> int | str:
    if batch == "auto":
        return batch
    if not batch.isdigit() or int(batch) < 1:
        raise ValueError(f"--batch {batch}: expected a number of rows, at least 1, or auto")
    return int(batch)


def _json(given: str, option: str) -> Any:
    """JSON from the command line, or from the file that `@` names."""
    import json

    text = given
    if given.startswith("@"):
        if not Path(given[1:]).is_file():
            raise ValueError(f"{option} {given}: there is no such file")
        text = Path(given[1:]).read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option}: no JSON ({error.msg} at character {error.pos}): {text[:60]!r}") from error


def _tasks(
    names: list[str], given: list[str], suite: str | None, texts: list[Path], shared: dict[str, Any], allow_code: bool
) -> dict[str, Task]:
    """Names -> tasks, in the order that the command line has them."""
    from sparing.evaluate import SUITES, HarnessTask, LmmsTask, PerplexityTask

    found: dict[str, Task] = {}

    def add(name: str, made: Task) -> None:
        if name in found:
            raise ValueError(f"the task {name} is asked twice: name it once")
        found[name] = made

    for name in [word for words in names for word in words.split(",") if word.strip()]:
        add(name.strip(), HarnessTask(name.strip(), **_fitting(HarnessTask, shared)))
    for name, called in SUITES[suite].items() if suite is not None else ():
        add(name, LmmsTask(called, **_fitting(LmmsTask, shared)))
    for words in given:
        settings = _json(words, "--task")
        if not isinstance(settings, dict) or not isinstance(settings.get("kind"), str):
            raise ValueError(
                '--task: expected an object with a "kind", such as {"kind": "perplexity", "text": "a.txt"}'
            )
        name, made = _made(settings, shared, allow_code)
        add(name, made)
    for path in texts:
        add(f"perplexity of {path.name}", PerplexityTask(path))
    if not found:
        raise ValueError("nothing to ask: give --tasks, --task, --suite or --text")
    return found


def _fitting(cls: type[Task], shared: dict[str, Any]) -> dict[str, Any]:
    """Those of the command's own options that are settings of a kind of task."""
    import inspect

    return {key: value for key, value in shared.items() if key in inspect.signature(cls).parameters}


def _made(settings: dict[str, Any], shared: dict[str, Any], allow_code: bool) -> tuple[str, Task]:
    """A task of the settings that somebody wrote; the command's own options fill what they leave out."""
    import dataclasses
    import inspect

    from pydantic import ValidationError

    from sparing.evaluate import task_class
    from sparing.study.names import made

    kind = settings["kind"]
    name = str(settings.get("name", ""))
    settings = {key: value for key, value in settings.items() if key not in ("kind", "name")}
    cls = task_class(kind)
    fields = set(inspect.signature(cls).parameters)
    filled = {
        key: value
        for key, value in _fitting(cls, shared).items()
        if value is not None and (key != "include" or kind == "lmms")
    }
    if kind == "perplexity":
        filled.pop("batch", None)
    if allow_code and "allow_code" in fields:
        filled["allow_code"] = True
    try:
        task = made(cls, {**filled, **settings})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"--task {kind}: {where}: {first['msg']}; settings are {', '.join(sorted(fields))}") from error
    if not name:
        assert dataclasses.is_dataclass(task)
        subject = next(
            (getattr(task, f.name) for f in dataclasses.fields(task) if isinstance(getattr(task, f.name), Path)), None
        )
        name = str(getattr(task, "task", "")) or (kind if subject is None else f"{kind} of {subject.name}")
    return name, task


def _policies(given: str, execute: Literal["gathered", "dense"]) -> list[Any]:
    """The policies of `--policy`: {name: arguments}, or a list as `sparing.json` has it."""
    from sparing.study.methods.policy import UsePolicy

    found = _json(given, "--policy")
    if isinstance(found, dict) and "class" in found:
        found = [found]
    if isinstance(found, dict):
        found = [{"class": name, "arguments": arguments} for name, arguments in found.items()]
    if not isinstance(found, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("class"), str) and isinstance(entry.get("arguments", {}), dict)
        for entry in found
    ):
        raise ValueError('--policy: expected {"SkipModules": {"attention": [3]}}, or a list of {"class", "arguments"}')
    return [UsePolicy(entry["class"], entry.get("arguments", {}), execute) for entry in found]


# Asking, and what was asked before ---------------------------------------------------------------------------------------


def _ask(
    asked: dict[str, Task],
    subject: Subject,
    seed: int,
    path: Path,
    console: Console,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Every task's outcome, with a bar each; results are kept as they come."""
    from sparing.cli.progress import step_bars
    from sparing.evaluate.measurements import Measurements

    known = Measurements(path, _subject_key(subject))
    found: dict[str, Any] = {}
    with step_bars(console, transient=True) as progress:
        for name, task in asked.items():
            bar = progress.add_task(name, total=1.0, line="")
            found[name] = known.get(
                _task_key(task, seed), lambda task=task, bar=bar: _measure(task, subject, seed, progress, bar)
            )
            progress.update(bar, completed=1.0, line="")
            keep(found)
    return found


def _measure(task: Task, subject: Subject, seed: int, progress: Any, bar: Any) -> dict[str, Any]:
    """One task's outcome as JSON knows it."""
    from sparing.evaluate import NotApplicable

    def on_step(done: float, line: str) -> None:
        progress.update(bar, completed=done, line=line)

    try:
        return _plain(task.measure(subject, seed=seed, on_step=on_step))
    except NotApplicable as reason:
        return {"not_applicable": str(reason)}


def _plain(outcome: Outcome) -> dict[str, Any]:
    import dataclasses

    return {
        "main": outcome.main,
        "figures": {name: dataclasses.asdict(figure) for name, figure in outcome.figures.items()},
        "items": {name: dict(scores) for name, scores in outcome.items.items()},
        "details": dict(outcome.details),
    }


def _subject_key(subject: Subject) -> str:
    """What is asked: weights, config, policies with what they learned, executor, device, and the versions that compute."""
    import hashlib

    import torch
    import transformers

    from sparing.checkpoint.registry import describe, tensors_of
    from sparing.evaluate.measurements import content_key

    learned = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors_of(subject.policies).items()):
        learned.update(name.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    model: Any = subject.model
    return content_key(
        model,
        describe(subject.policies),
        learned.hexdigest(),
        subject.execute,
        str(model.get_input_embeddings().weight.device),
        [torch.__version__, transformers.__version__],
    )


def _task_key(task: Task, seed: int) -> str:
    """A task's settings and the content of its files."""
    import hashlib

    files = [hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest() for path in task.files()]
    return f"{task!r} | seed {seed} | {' '.join(files)}"


# Showing ----------------------------------------------------------------------------------------------------------------


def _print(found: dict[str, Any], follows: str, console: Console) -> None:
    """A table a task: figure, value, interval, items, and its unit or what guessing would score."""
    from rich.table import Table
    from rich.text import Text

    console.print(Text(follows, style="italic"), soft_wrap=True)
    for name, entry in found.items():
        console.print()
        console.print(Text(name, style="bold"), soft_wrap=True)
        if "not_applicable" in entry:
            console.print(Text(f"  not applicable: {entry['not_applicable']}", style="yellow"), soft_wrap=True)
            continue
        details = entry["details"]
        table = Table(box=None, padding=(0, 2), header_style="dim")
        for title, right in (
            ("", False),
            ("value", True),
            ("95% interval", False),
            ("items", True),
            ("", False),
        ):
            table.add_column(title, justify="right" if right else "left", no_wrap=True)
        for figure, value in entry["figures"].items():
            style = "bold" if figure == entry["main"] else ""
            interval = "" if value["low"] is None else f"{_number(value['low'])} to {_number(value['high'])}"
            guess = figure.startswith(("acc", "exact")) and details.get("chance")
            words = _unit(value["unit"]) if value["value"] != float("inf") else details.get(figure, "")
            table.add_row(
                Text(figure, style=style),
                Text(_number(value["value"]), style=style),
                interval,
                "" if value["n"] is None else str(value["n"]),
                Text(f"chance {_number(details['chance'])}" if guess else words, style="dim"),
            )
        console.print(table)
        if details.get("inputs_shortened"):
            cut = details["inputs_shortened"]
            console.print(
                Text(f"  {cut} inputs were longer than the model takes, and lost their beginning", style="yellow")
            )
    console.print()


def _number(value: float) -> str:
    """Four digits that matter."""
    return f"{value:,.0f}" if abs(value) >= 10_000 and abs(value) != float("inf") else f"{value:.4g}"


def _unit(unit: str) -> str:
    return "" if unit == "share" else unit
