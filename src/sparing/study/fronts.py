"""Quality against what it costs: points of a study's arms, and those that nothing else beats on both."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

from sparing.evaluate.task import Figure
from sparing.study.contrast import Value, value_of
from sparing.study.results import Arm, Results
from sparing.study.store import Stored
from sparing.study.tables import Grid

COUNTED = "flops_share"
# Figures of a task's own passes, measured beside its quality.
OWN_SECONDS = ("seconds", "tokens_per_second")


@dataclasses.dataclass(frozen=True)
class Axis:
    """What a point's place across stands for.

    Attributes:
        name: of the figure.
        task: the task that measures it; empty for the quality's own task.
        kind: measured on a clock, or counted by the ledger.
        better: which way is cheaper.
        unit: of the figure.
    """

    name: str
    task: str
    kind: Literal["measured", "counted"]
    better: Literal["higher", "lower"]
    unit: str


@dataclasses.dataclass(frozen=True)
class Point:
    """An arm's place.

    Attributes:
        arm: the arm.
        cost: its place across, seeds together.
        quality: its place up, seeds together.
        front: is no other point at least as good on both and better on one?
    """

    arm: Arm
    cost: Value
    quality: Value
    front: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """Quality against one cost, for a model and a task.

    Attributes:
        axis: the cost.
        points: the arms that have both.
        left_out: label -> why it has no point.
    """

    axis: Axis
    points: tuple[Point, ...]
    left_out: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Front:
    """The charts of a model and a task.

    Attributes:
        model: the model.
        task: the task.
        figure: its main figure.
        better: which way is better.
        unit: of the figure.
        charts: one a cost that at least two arms have; measured ones first.
    """

    model: str
    task: str
    figure: str
    better: Literal["higher", "lower"]
    unit: str
    charts: tuple[Chart, ...]


def fronts_of(results: Results) -> list[Front]:
    """Quality against cost for every model and every task whose main figure has a direction; tasks of seconds aside."""
    grid = Grid(results)
    timed = {cell.task for cell in results.cells if _is_timed(cell)}
    found = []
    for model, task in dict.fromkeys((cell.model, cell.task) for cell in results.cells):
        cells = [cell for cell in results.cells if (cell.model, cell.task) == (model, task)]
        outcomes = [cell.result.outcome for cell in cells if cell.result.outcome is not None]
        if task in timed or not outcomes:
            continue
        name = outcomes[0].main
        main = outcomes[0].figures[name]
        if main.better is None:
            continue
        speeds = [t for t in dict.fromkeys(cell.task for cell in results.cells if cell.model == model) if t in timed]
        charts = [_chart(results, grid, model, task, name, axis) for axis in _axes(results, model, task, speeds)]
        charts = [chart for chart in charts if len(chart.points) > 1]
        if charts:
            found.append(Front(model, task, name, main.better, main.unit, tuple(charts)))
    return found


def _is_timed(cell: Stored) -> bool:
    outcome = cell.result.outcome
    return outcome is not None and any("speed-up" in name for name in outcome.figures)


def _axes(results: Results, model: str, task: str, speeds: Sequence[str]) -> list[Axis]:
    """Measured speed-ups of the timing tasks, the task's own seconds, and the counted operations."""
    found: dict[tuple[str, str], Axis] = {}
    for cell in results.cells:
        if cell.model != model or cell.result.outcome is None:
            continue
        for name, figure in cell.result.outcome.figures.items():
            if cell.task in speeds and "speed-up" in name and figure.better is not None:
                found.setdefault((cell.task, name), Axis(name, cell.task, "measured", figure.better, figure.unit))
            elif cell.task == task and name in OWN_SECONDS and figure.better is not None:
                found.setdefault(("", name), Axis(name, "", "measured", figure.better, figure.unit))
    # Phases of one batch size together, as the task lists them; then what the task itself took.
    return [*found.values(), Axis(COUNTED, "", "counted", "lower", "share")]


def _chart(results: Results, grid: Grid, model: str, task: str, figure: str, axis: Axis) -> Chart:
    points, left_out = [], {}
    for arm in grid.arms:
        cells = grid.cells(arm, model, task)
        if not cells:
            continue
        quality_cells, cost_cells = _matched(cells, grid.cells(arm, model, axis.task) if axis.task else cells)
        quality, cost = value_of(quality_cells, figure), _cost(cost_cells, axis)
        if value_of(cells, figure) is None:
            left_out[arm.label] = f"no {figure}: {_why(cells)}"
        elif quality is None or cost is None:
            left_out[arm.label] = f"no {axis.name} of the same subject"
        elif not (math.isfinite(quality.value) and math.isfinite(cost.value)):
            left_out[arm.label] = "not a finite number"
        else:
            points.append(Point(arm, cost, quality))
    better = next(iter(p.quality.figure.better for p in points), None)
    signs = (1 if axis.better == "higher" else -1, 1 if better == "higher" else -1)
    # Twelve digits: a mean over equal seeds may differ from its seeds in the last one.
    places = [(signs[0] * _rounded(p.cost.value), signs[1] * _rounded(p.quality.value)) for p in points]
    marked = [dataclasses.replace(point, front=on) for point, on in zip(points, undominated(places), strict=True)]
    return Chart(axis, tuple(marked), left_out)


def _matched(quality: Sequence[Stored], cost: Sequence[Stored]) -> tuple[list[Stored], list[Stored]]:
    """The cells whose subject both tasks measured: a seeded subject is another one with every seed."""
    done = [[cell for cell in cells if cell.result.outcome is not None] for cells in (quality, cost)]
    both = {cell.subject for cell in done[0]} & {cell.subject for cell in done[1]}
    return [c for c in done[0] if c.subject in both], [c for c in done[1] if c.subject in both]


def _cost(cells: Sequence[Stored], axis: Axis) -> Value | None:
    if (found := value_of(cells, axis.name)) is not None or axis.kind == "measured":
        return found
    # What the method itself counted when it chose, where the task counts nothing.
    return _from_details(cells, lambda cell: cell.result.details.get("method", {}).get(COUNTED))


def _from_details(cells: Sequence[Stored], ask: Callable[[Stored], object]) -> Value | None:
    shares = [(cell.seed, value) for cell in cells if isinstance(value := ask(cell), (int, float))]
    if not shares or len(shares) < len(cells):
        return None
    mean = sum(value for _, value in shares) / len(shares)
    return Value(mean, None, None, "", tuple(shares), Figure(mean, better="lower", unit="share"))


def _rounded(value: float) -> float:
    return float(f"{value:.12g}")


def _why(cells: Sequence[Stored]) -> str:
    failed = next((cell for cell in cells if cell.result.status != "done"), None)
    return f"{failed.result.status}: {failed.result.error}" if failed else "the task does not tell it"


def undominated(places: Sequence[tuple[float, float]]) -> list[bool]:
    """Which places no other beats: at least as high on both axes and higher on one."""
    return [not any(a[0] >= b[0] and a[1] >= b[1] and a != b for a in places) for b in places]
