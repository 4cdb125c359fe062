"""How two arms differ in a figure, and how sure that is: over items and seeds where both have them, else by their intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from sparing.evaluate import statistics
from sparing.evaluate.task import Figure
from sparing.study.store import Stored

# Below this many items a bootstrap interval is too narrow, and t is taken.
FEW = 20
Verdict = Literal["better", "worse", "other", "same", "unsure"]


@dataclasses.dataclass(frozen=True)
class Value:
    """A figure of an arm, all its seeds together.

    Attributes:
        value: the figure of one cell, or the mean over seeds; NaN where no seed has a number.
        low: lower end of the 95% interval; `None` where none can be told.
        high: upper end.
        over: what the interval is over: `seeds` (t), `items` (the task's own), or nothing.
        seeds: each seed's value.
        figure: of the first cell: direction and unit.
    """

    value: float
    low: float | None
    high: float | None
    over: Literal["seeds", "items", ""]
    seeds: tuple[tuple[int | None, float], ...]
    figure: Figure

    @property
    def not_numbers(self) -> int:
        """How many seeds have no finite number; they are not in the mean."""
        return sum(not math.isfinite(value) for _, value in self.seeds)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Second minus first.

    Attributes:
        value: the difference; NaN where one side is no number.
        low: lower end of its 95% interval; `None` where none can be told.
        high: upper end.
        p: two-sided; `None` where there is no test.
        basis: what it stands on, in words.
        better: which way is better.
        higher: items on which the second is higher; `None` without items, or with several seeds.
        lower: items on which it is lower.
    """

    value: float
    low: float | None
    high: float | None
    p: float | None
    basis: str
    better: Literal["higher", "lower"] | None
    higher: int | None = None
    lower: int | None = None

    @property
    def told_apart(self) -> bool:
        """Does the interval exclude 0?"""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def verdict(self) -> Verdict:
        """What it says: `other` is told apart where no direction is better; `unsure` is not told apart."""
        if self.value == 0:
            return "same"
        if not self.told_apart:
            return "unsure"
        if self.better is None:
            return "other"
        return "better" if (self.value > 0) == (self.better == "higher") else "worse"


def value_of(cells: Sequence[Stored], figure: str) -> Value | None:
    """A figure of cells that differ in their seed only; `None` if no cell has it.

    Two seeds or more: the mean with its t interval over seeds. One cell: as the task told it.
    """
    found = [
        (cell.seed, cell.result.outcome.figures[figure])
        for cell in cells
        if cell.result.outcome is not None and figure in cell.result.outcome.figures
    ]
    if not found:
        return None
    first = found[0][1]
    each = tuple((seed, one.value) for seed, one in found)
    if len(found) == 1:
        known = first.low is not None and math.isfinite(first.value)
        low, high = (first.low, first.high) if known else (None, None)
        return Value(first.value, low, high, "items" if known else "", each, first)
    numbers = [value for _, value in each if math.isfinite(value)]
    if not numbers:
        return Value(math.nan, None, None, "", each, first)
    mean = statistics.over_seeds(numbers)
    if len(numbers) == 1:
        return Value(mean.value, None, None, "", each, first)
    low, high = mean.low, mean.high
    if first.unit == "share" and first.better == "higher" and min(numbers) >= 0 and max(numbers) <= 1:
        # Few seeds know nothing of the ends of a share: t may leave them.
        low, high = max(0.0, low), min(1.0, high)
    return Value(mean.value, low, high, "seeds", each, first)


def contrast(first: Sequence[Stored], second: Sequence[Stored], figure: str) -> Difference | None:
    """How the cells of one arm differ from those of another, same model and task; `None` if one lacks the figure.

    Cells are paired by seed; a side without seeds is paired with every seed of the other. Over the items that both sides
    have, with one pair: the mean difference with a bootstrap interval (t below 20 items) and the sign test. With several
    seeds: seeds and items both count as drawn at random, and the variances of their means add up (a little more than the
    truth, so the interval errs to the wide side). Without items: a t interval over the seeds that both sides have; else the
    two intervals against each other, told apart only where they do not overlap.
    """
    first, second = with_figure(first, figure), with_figure(second, figure)
    one, two = value_of(first, figure), value_of(second, figure)
    if one is None or two is None:
        return None
    better = two.figure.better
    if one.not_numbers or two.not_numbers:
        return Difference(math.nan, None, None, None, "not a number", better)
    pairs, same_seeds = _pairs(first, second)
    if (found := _over_items(pairs, figure, better)) is not None:
        return found
    if same_seeds and len(pairs) > 1:
        differences = [_number(b, figure) - _number(a, figure) for a, b in pairs]
        mean = statistics.over_seeds(differences)
        p = _t_test(mean.value, _error(differences), len(differences) - 1)
        return Difference(mean.value, mean.low, mean.high, p, f"{len(pairs)} seeds", better)
    difference = two.value - one.value
    if one.low is None or two.low is None or one.high is None or two.high is None:
        return Difference(difference, None, None, None, "no interval", better)
    low, high = two.low - one.high, two.high - one.low
    return Difference(difference, low, high, None, "the two intervals", better)


def with_figure(cells: Sequence[Stored], figure: str) -> list[Stored]:
    """The cells that have a figure."""
    return [cell for cell in cells if cell.result.outcome is not None and figure in cell.result.outcome.figures]


def _pairs(first: Sequence[Stored], second: Sequence[Stored]) -> tuple[list[tuple[Stored, Stored]], bool]:
    """Cells to compare with each other, and whether both have seeds of their own."""
    by_seed = {cell.seed: cell for cell in first}
    if same := [(by_seed[cell.seed], cell) for cell in second if cell.seed in by_seed]:
        return same, same[0][0].seed is not None
    if len(first) == 1 and first[0].seed is None:
        return [(first[0], cell) for cell in second], False
    if len(second) == 1 and second[0].seed is None:
        return [(cell, second[0]) for cell in first], False
    return [], False


def _over_items(
    pairs: Sequence[tuple[Stored, Stored]], figure: str, better: Literal["higher", "lower"] | None
) -> Difference | None:
    scores = [(_items(a, figure), _items(b, figure)) for a, b in pairs]
    names = sorted(set.intersection(*(x.keys() & y.keys() for x, y in scores))) if scores else []
    if not names:
        return None
    if len(scores) == 1:
        (x, y), n = scores[0], len(names)
        paired = statistics.compare({name: x[name] for name in names}, {name: y[name] for name in names})
        found = paired.difference
        if 1 < n < FEW:
            found = statistics.weighted_mean([y[name] - x[name] for name in names])
        low, high = (found.low, found.high) if math.isfinite(found.low) else (None, None)
        # What another seed would give is not in it.
        basis = _counted(n) + (", one seed only" if any(cell.seed is not None for cell in pairs[0]) else "")
        return Difference(found.value, low, high, paired.p, basis, better, paired.higher, paired.lower)
    table = np.array([[y[name] - x[name] for name in names] for x, y in scores])
    n_seeds, n_items = table.shape
    # A two-way layout with both ways random: what the cells themselves vary by is in both terms, once too often.
    over_seeds = float(table.mean(1).var(ddof=1)) / n_seeds
    over_items = float(table.mean(0).var(ddof=1)) / n_items if n_items > 1 else 0.0
    mean, error = float(table.mean()), math.sqrt(over_seeds + over_items)
    basis = f"{_counted(n_items)} × {n_seeds} seeds"
    if error == 0:
        return Difference(mean, mean, mean, None, basis, better)
    parts = over_seeds**2 / (n_seeds - 1) + (over_items**2 / (n_items - 1) if n_items > 1 else 0.0)
    freedom = (over_seeds + over_items) ** 2 / parts
    from scipy.stats import t

    half = float(t.ppf(0.975, freedom)) * error
    return Difference(mean, mean - half, mean + half, _t_test(mean, error, freedom), basis, better)


def _items(cell: Stored, figure: str) -> dict[str, float]:
    assert cell.result.outcome is not None
    scores = cell.result.outcome.items.get(figure, {})
    return {name: score for name, score in scores.items() if math.isfinite(score)}


def _number(cell: Stored, figure: str) -> float:
    assert cell.result.outcome is not None
    return cell.result.outcome.figures[figure].value


def _error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def _t_test(mean: float, error: float, freedom: float) -> float | None:
    from scipy.stats import t

    return 2 * float(t.sf(abs(mean) / error, freedom)) if error > 0 else None


def _counted(n: int) -> str:
    return f"{n} item{'s' * (n != 1)}"
