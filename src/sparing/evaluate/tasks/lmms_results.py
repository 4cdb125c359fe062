"""What lmms-eval found, as figures with intervals and scores of documents."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from sparing.evaluate import statistics
from sparing.evaluate.task import Figure, Outcome
from sparing.evaluate.tasks.harness_results import mean_figure, told_of_writing
from sparing.evaluate.tasks.metering import Meter
from sparing.evaluate.tasks.writing import Written, as_figure

# Answers that the drill-down shows whole.
SHOWN = 20


def outcome_of(
    found: Mapping[str, Any],
    tasks: Mapping[str, Any],
    metric: str | None,
    name: str,
    written: Mapping[tuple[str, int], Sequence[Written]],
    meter: Meter,
    seed: int,
) -> Outcome:
    """lmms-eval's results as figures with intervals, and scores of the documents.

    Args:
        found: what `simple_evaluate` gave, samples included.
        tasks: its task objects, by name.
        metric: the figure that counts; the first one by default.
        name: what was asked, for messages.
        written: (task, document) -> answers.
        meter: of the task.
        seed: of the bootstrap.

    Raises:
        ValueError: there is no such figure, or none.
    """
    figures: dict[str, Figure] = {}
    items: dict[str, dict[str, float]] = {}
    alone = len(tasks) == 1
    for task_name, task in tasks.items():
        samples = found["samples"][task_name]
        prefix = "" if alone else f"{task_name}/"
        for figure in task.aggregation():
            rows = [row for row in samples if figure in row]
            if rows:
                _figure(task, figure, rows, found["results"][task_name], prefix, seed, figures, items)
    if metric is not None:
        if metric not in figures:
            raise ValueError(f"the task {name} has no figure {metric!r}; it has {', '.join(figures)}")
        figures = {metric: figures[metric], **figures}
    if not figures:
        raise ValueError(f"the task {name} gives no figure that can be read")
    details: dict[str, Any] = {"task": name, "lmms_eval": version("lmms-eval"), "documents": 0, "answers": []}
    for task_name in tasks:
        details["documents"] += len(found["samples"][task_name])
        details["answers"] += [_shown(task_name, row) for row in found["samples"][task_name]]
    details["answers"] = details["answers"][:SHOWN]
    answers = [(f"{'' if alone else task + '/'}{doc}", w) for (task, doc), ws in written.items() for w in ws]
    if answers:
        scores = items.get(next(iter(figures)), {})
        solved = [scores.get(key) for key, _ in answers]
        told, by_item, said = told_of_writing(answers, solved, meter, seed=seed)
        figures, items, details = {**figures, **told}, {**items, **by_item}, {**details, **said}
    details["cost"] = meter.details()
    return Outcome({**figures, **meter.figures()}, items, details)


def _figure(
    task: Any,
    figure: str,
    rows: Sequence[Mapping[str, Any]],
    results: Mapping[str, Any],
    prefix: str,
    seed: int,
    figures: dict[str, Figure],
    items: dict[str, dict[str, float]],
) -> None:
    """One figure of one task: with each document's score where it is a mean of them."""
    better: Any = {True: "higher", False: "lower"}.get(task.higher_is_better().get(figure))
    values = [row[figure] for row in rows]
    told = next((value for key, value in results.items() if key.partition(",")[0] == figure), None)
    if not isinstance(told, (int, float)) or not math.isfinite(told):
        # A task's submission for a server has no number.
        return
    if all(isinstance(value, (int, float)) or hasattr(value, "item") for value in values):
        numbers = [float(value) for value in values]
        if math.isclose(sum(numbers) / len(numbers), told, rel_tol=1e-6, abs_tol=1e-9):
            figures[prefix + figure] = mean_figure(numbers, better, seed)
            items[prefix + figure] = {f"{prefix}{row['doc_id']}": n for row, n in zip(rows, numbers, strict=True)}
            return
    aggregate = task.aggregation()[figure]
    if "args" in inspect.signature(aggregate).parameters:
        # It writes files, and may ask a judge over the network: once is enough.
        figures[prefix + figure] = Figure(float(told), n=len(rows), better=better)
        return
    figures[prefix + figure] = as_figure(statistics.resampled(values, aggregate, seed=seed), better, "")


def _shown(task: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """A document's answer for the drill-down."""
    return {"item": f"{task}/{row['doc_id']}", "gold": str(row["target"]), "answer": str(row["filtered_resps"])}
