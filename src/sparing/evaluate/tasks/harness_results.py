"""What lm-eval found, as figures with intervals and scores of documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparing.evaluate import statistics
from sparing.evaluate.task import Figure, Outcome
from sparing.evaluate.tasks.metering import Meter
from sparing.evaluate.tasks.writing import Written, as_figure, writing_figures


def outcome_of(
    found: Any,
    loaded: Any,
    metric: str | None,
    name: str,
    written: dict[tuple[str, int], list[Written]],
    shortened: int,
    meter: Meter,
    seed: int,
) -> Outcome:
    """lm-eval's results as figures with intervals, and scores of the documents."""
    tasks: dict[str, Any] = loaded["tasks"]
    figures: dict[str, Figure] = {}
    items: dict[str, dict[str, float]] = {}
    alone = len(tasks) == 1
    details: dict[str, Any] = {"task": name, "lm_eval": _version(), "versions": found["versions"]}
    chances, counted = 0.0, 0
    for task_name, task in tasks.items():
        samples = found["samples"][task_name]
        prefix = "" if alone else f"{task_name}/"
        _task_figures(task, samples, prefix, seed, figures, items)
        chance = _chance(task, samples)
        if chance is not None:
            chances, counted = chances + chance, counted + 1
    for group, results in found.get("groups", {}).items():
        if len(found["groups"]) == 1 and not alone:
            figures = {**_group_figures(results, tasks, items), **figures}
        details.setdefault("groups", {})[group] = {k: v for k, v in results.items() if isinstance(v, float)}
    if metric is not None:
        if metric not in figures:
            raise ValueError(f"the task {name} has no figure {metric!r}; it has {', '.join(figures)}")
        figures = {metric: figures[metric], **figures}
    if not figures:
        raise ValueError(f"the task {name} gives no figure that can be read")
    if counted == len(tasks):
        details["chance"] = chances / counted
    answers = [(f"{task}/{doc}", w) for (task, doc), ws in written.items() for w in ws]
    if answers:
        scores = items.get(next(iter(figures)), {})
        by_document = {_document(key): score for key, score in scores.items()}
        first = next(iter(tasks))
        solved = [by_document.get(key if not alone else key.removeprefix(f"{first}/")) for key, _ in answers]
        told, by_item, said = told_of_writing(answers, solved, meter, seed=seed)
        figures, items, details = {**figures, **told}, {**items, **by_item}, {**details, **said}
    details |= {
        "inputs_shortened": shortened,
        "cost": meter.details(),
        "documents": sum(len(found["samples"][t]) for t in tasks),
    }
    return Outcome({**figures, **meter.figures()}, items, details)


def _task_figures(
    task: Any,
    samples: Sequence[dict[str, Any]],
    prefix: str,
    seed: int,
    figures: dict[str, Figure],
    items: dict[str, dict[str, float]],
) -> None:
    """Figures of one task: with each document's score where the metric is a mean."""
    from lm_eval.api import metrics

    for chosen in dict.fromkeys(sample["filter"] for sample in samples):
        rows = [sample for sample in samples if sample["filter"] == chosen]
        for metric in rows[0]["metrics"]:
            aggregate = task.aggregation().get(metric, metrics.mean)
            better = {True: "higher", False: "lower"}.get(task.higher_is_better().get(metric))
            name = f"{prefix}{metric}" + ("" if chosen == "none" else f",{chosen}")
            values = [row[metric] for row in rows]
            if aggregate is metrics.mean and all(isinstance(v, (int, float)) or hasattr(v, "item") for v in values):
                numbers = [float(v) for v in values]
                figures[name] = mean_figure(numbers, better, seed)
                items[name] = {
                    f"{prefix}{row['doc_id']}:{row['doc_hash'][:12]}": number
                    for row, number in zip(rows, numbers, strict=True)
                }
            else:
                figures[name] = as_figure(statistics.resampled(values, aggregate, seed=seed), better, "")


def mean_figure(numbers: list[float], better: Any, seed: int) -> Figure:
    """The mean of documents' scores: a share with Wilson's interval where all are 0 or 1, else with the bootstrap's."""
    if all(number in (0.0, 1.0) for number in numbers):
        return as_figure(statistics.share(int(sum(numbers)), len(numbers)), better, "share")
    return as_figure(statistics.mean(numbers, seed=seed), better, "")


def _group_figures(
    results: Mapping[str, Any], tasks: Mapping[str, Any], items: Mapping[str, Mapping[str, float]]
) -> dict[str, Figure]:
    """A group's own figures; with an interval where the group is the mean of all its documents."""
    figures = {}
    for key, value in results.items():
        metric, _, chosen = key.partition(",")
        if not isinstance(value, float) or metric.endswith("_stderr"):
            continue
        name = metric + ("" if chosen in ("", "none") else f",{chosen}")
        pooled = [score for task in tasks for score in items.get(f"{task}/{name}", {}).values()]
        if pooled and abs(sum(pooled) / len(pooled) - value) < 1e-9:
            figures[name] = mean_figure(pooled, "higher", 0)
        else:
            figures[name] = Figure(value)
    return figures


def _chance(task: Any, samples: Sequence[dict[str, Any]]) -> float | None:
    """What guessing would score in a multiple-choice task."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    asked = {sample["doc_id"]: sample["doc"] for sample in samples}
    return sum(1 / len(task.doc_to_choice(doc)) for doc in asked.values()) / len(asked)


def _document(key: str) -> str:
    """The document of an item's name, without its hash."""
    return key.rpartition(":")[0]


def told_of_writing(
    answers: Sequence[tuple[str, Written]], solved: Sequence[float | None], meter: Meter, *, seed: int
) -> tuple[dict[str, Figure], dict[str, dict[str, float]], dict[str, Any]]:
    """What is told of answers that were written: figures, scores of items, details.

    Args:
        answers: each with its document's name.
        solved: the score of each; seconds a solved problem are told where all are right or wrong.
        meter: what writing them cost.
        seed: of the bootstrap.
    """
    known = all(score in (0.0, 1.0) for score in solved)
    right = [bool(score) for score in solved] if known else None
    items = {
        "output_tokens": mean_of([(key, float(len(w.ids))) for key, w in answers]),
        "truncated": mean_of([(key, float(not w.finished)) for key, w in answers]),
    }
    details = {"seconds_per_solved": "none solved"} if known and not any(solved) else {}
    return writing_figures(right, [w for _, w in answers], meter, seed=seed), items, details


def mean_of(pairs: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Means by name, where documents were asked several times."""
    found: dict[str, list[float]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return {key: sum(values) / len(values) for key, values in found.items()}


def _version() -> str:
    from importlib.metadata import version

    return version("lm-eval")
