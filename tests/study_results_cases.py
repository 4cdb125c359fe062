"""Stores of invented studies, written as a run writes them: no model is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparing.evaluate.task import Figure, Outcome
from sparing.study.cells import Cell
from sparing.study.methods.policy import Dense
from sparing.study.spec import ModelEntry, Variant
from sparing.study.store import Result, Store

EVIL = '</script><img src=x onerror="window.hacked=1">\'&'
ENVIRONMENT = {
    "versions": {"python": "3.12.1", "torch": "2.13.0"},
    "git": {"sha": "0123abcd", "dirty": False},
    "hardware": {"cpu": "Abacus 9000", "cores": 2, "gpus": []},
}
OTHER = {**ENVIRONMENT, "hardware": {"cpu": "Slide rule", "cores": 4, "gpus": ["Graph paper"]}}


def variant(name: str, use: str = "", **varied: Any) -> Variant:
    return Variant(name, varied, Dense(), use or name, {**varied, "text": "stories.txt"}, 1)


def cell(
    model: str,
    method: Variant,
    task: Variant,
    *,
    seed: int | None = None,
    training: Variant | None = None,
    salt: str = "",
    shrink: bool = False,
) -> Cell:
    """A cell whose key and subject follow from its names, as real ones follow from their content."""
    subject = (
        f"{model}|{method.label}|{training.label if training else None}|{seed if method.use != 'dense' else None}{salt}"
    )
    key = hashlib.sha256(f"{subject}|{task.label}|{seed}".encode()).hexdigest()[:16]
    return Cell(
        key=key,
        subject=hashlib.sha256(subject.encode()).hexdigest()[:16],
        model=model,
        checkpoint=ModelEntry(path=f"models/{model}"),
        method=method,
        training=training,
        task=task,
        seed=seed,
        shrink=shrink,
    )


def done(figures: Mapping[str, Figure], items: Mapping[str, Mapping[str, float]] | None = None, **more: Any) -> Result:
    environment = more.pop("environment", ENVIRONMENT)
    outcome = Outcome(figures, items or {}, more.pop("details", {}))
    return Result(
        "done", outcome, seconds=1.5, started="2026-03-01T10:00:00+00:00", environment=environment, details=more
    )


def loss(values: Sequence[float], *, name: str = "loss") -> Result:
    """A task's result whose figure is the mean of items."""
    mean = sum(values) / len(values)
    half = 0.1
    figure = Figure(mean, mean - half, mean + half, len(values), "lower", "nats/token")
    return done({name: figure}, {name: {f"w{i}": value for i, value in enumerate(values)}})


def stored(
    folder: Path,
    cells: Sequence[tuple[Cell, Result]],
    *,
    pending: Sequence[Cell] = (),
    control_of: Mapping[str, str] | None = None,
    **about: Any,
) -> Path:
    """Write a folder as a run leaves it; `control_of` names methods whose variants are each other's, by what varies."""
    folder.mkdir(parents=True, exist_ok=True)
    all_cells = [c for c, _ in cells] + list(pending)
    methods = list({c.method.label: c.method for c in all_cells}.values())
    places = {method.label: i for i, method in enumerate(methods)}
    matched = [
        (places[arm.label], places[control.label])
        for arm in methods
        for control in methods
        if (control_of or {}).get(control.name) == arm.name and arm.varied == control.varied
    ]
    with Store(folder / "results.sqlite", create=True) as store:
        # Nothing here must outlive a power cut, and a thousand waits for the disk take half a minute.
        store._base.execute("PRAGMA synchronous = OFF")
        for each, result in cells:
            store.put(each, result)
        defaults = {"study": "toy", "about": "", "baseline": "dense", "questions": [], "shrink": False}
        store.describe(
            **{**defaults, **about},
            cells=[c.key for c in all_cells],
            labels={c.key: c.label for c in all_cells},
            variants={c.key: places[c.method.label] for c in all_cells},
            matched=matched,
        )
    return folder


def realistic(folder: Path, *, seeds: int = 3, budgets: Sequence[float] = (0.9, 0.7, 0.5), scale: float = 1.0) -> Path:
    """2 models, 4 methods, 3 budgets, 3 tasks, 3 seeds; failures, cells that do not apply, NaN, and markup in names."""
    dice = random.Random(0)
    tasks = [variant("stories", "perplexity"), variant("quiz", "choice"), variant("speed", "speed")]
    cells: list[tuple[Cell, Result]] = []
    for model, level in (("tiny-llama", 2.0), ("wide <b>qwen</b>", 1.6)):
        arms: list[tuple[Variant, int | None, float]] = [(variant("dense", "dense"), None, 1.0)]
        arms += [(variant("search", "skip_search", budget=b), None, b) for b in budgets]
        arms += [(variant("random", "skip_random", budget=b), s, b) for b in budgets for s in range(seeds)]
        arms += [(variant("router", "SkipGPT", budget=b, note=EVIL), s, b) for b in budgets for s in range(seeds)]
        difficulty = [dice.gauss(0, 0.3) for _ in range(40)]
        for method, seed, budget in arms:
            harm = {"dense": 0.0, "search": 0.5, "random": 1.6, "router": 0.3}[method.name] * (1 - budget) ** 1.3
            luck = dice.gauss(0, 0.05) if seed is not None else 0.0
            for task in tasks:
                made = cell(model, method, task, seed=seed)
                cells.append(
                    (made, _result(dice, task.name, level + harm * scale + luck, difficulty, method.name, budget))
                )
    cells = [_spoiled(i, made, result) for i, (made, result) in enumerate(cells)]
    questions = [
        {
            "ask": "What does it cost on stories & quizzes?",
            "tasks": ["stories", "quiz"],
            "methods": None,
            "figures": None,
        },
        {
            "ask": f"How fast? {EVIL}",
            "tasks": ["speed"],
            "methods": ["search", "random"],
            "figures": ["prefill speed-up (batch 1)", "no such"],
        },
    ]
    pending = [cell("tiny-llama", variant("later"), tasks[0])]
    return stored(
        folder,
        cells,
        pending=pending,
        control_of={"random": "search"},
        study="invented",
        about=f"All of it is made up. {EVIL}",
        questions=questions,
    )


def _result(
    dice: random.Random, task: str, level: float, difficulty: Sequence[float], method: str, budget: float
) -> Result:
    chosen = {"plan": "attention: 1, 3", "flops_share": budget}
    if task == "stories":
        losses = [level + d + dice.gauss(0, 0.03) for d in difficulty]
        mean = sum(losses) / len(losses)
        figures = {
            "loss": Figure(mean, mean - 0.1, mean + 0.1, len(losses), "lower", "nats/token"),
            "perplexity": Figure(math.exp(mean), math.exp(mean - 0.1), math.exp(mean + 0.1), len(losses), "lower"),
            "flops_share": Figure(budget, n=len(losses), better="lower", unit="share"),
        }
        scores = {f"<i>{i}</i>": value for i, value in enumerate(losses)}
        return done(figures, {"loss": scores}, details={"windows": len(losses), "text": EVIL}, method=chosen)
    if task == "quiz":
        right = [float(dice.random() < 1.2 - level / 4) for _ in range(60)]
        share = sum(right) / len(right)
        figures = {"accuracy": Figure(share, max(0, share - 0.12), min(1, share + 0.12), 60, "higher", "share")}
        return done(figures, {"accuracy": {str(i): r for i, r in enumerate(right)}}, method=chosen)
    gain = 1.0 if method == "dense" else 0.8 / budget + dice.gauss(0, 0.02)
    figures = {
        "prefill speed-up (batch 1)": Figure(gain, gain - 0.04, gain + 0.05, 9, "higher"),
        "prefill speed-up by operations (batch 1)": Figure(1 / budget),
        "decode speed-up (batch 1)": Figure(gain**0.5, gain**0.5 - 0.02, gain**0.5 + 0.02, 9, "higher"),
        "prefill seconds (batch 1)": Figure(0.1 / gain, 0.09 / gain, 0.11 / gain, 9, "lower", "seconds"),
    }
    return done(figures, method=chosen, environment=OTHER if dice.random() < 0.1 else ENVIRONMENT)


def _spoiled(i: int, made: Cell, result: Result) -> tuple[Cell, Result]:
    """Some cells as a hard day leaves them."""
    name, task, first = made.method.name, made.task.name, made.model == "tiny-llama"
    if name == "router" and task == "quiz" and made.seed == 1:
        return made, Result(
            "failed",
            error=f"RuntimeError: broke {EVIL}",
            traceback=f"Traceback\n {EVIL}\nRuntimeError",
            environment=ENVIRONMENT,
        )
    if name == "router" and task == "speed" and not first:
        return made, Result(
            "not applicable", error="SkipGPT cannot act on this model: no room", environment=ENVIRONMENT
        )
    if name == "random" and task == "stories" and made.method.varied["budget"] == 0.5 and made.seed == 2 and first:
        assert result.outcome is not None
        figures = {k: dataclasses.replace(f, value=math.nan) for k, f in result.outcome.figures.items()}
        return made, dataclasses.replace(result, outcome=Outcome(figures, {"loss": {"w0": math.nan}}))
    return made, result
