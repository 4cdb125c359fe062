"""How sure a figure is: intervals of shares, means, ratios and other statistics, and paired comparisons.

Everything is at 95% by default. scipy does the arithmetic; here is only what to ask of it, and when.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000
# BCa needs the statistic without each item in turn, n times n work; its correction shrinks with sqrt(n) and is gone by then.
LARGEST_BCA = 2000
# Elements of one block of resamples.
_BLOCK = 1 << 22

Statistic = Callable[..., Any]
"""Takes one array a column, with the items along the last axis, and `axis`; gives one number a row."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A number with its interval.

    Attributes:
        value: the number.
        low: lower end; `-inf` where nothing can be told.
        high: upper end.
        n: items that it is made of.
        method: how the interval was found.
    """

    value: float
    low: float
    high: float
    n: int
    method: str


@dataclasses.dataclass(frozen=True)
class Paired:
    """Two arms on the same items.

    Attributes:
        difference: mean of (second - first), with a bootstrap interval over items.
        higher: items on which the second arm scores higher.
        lower: items on which it scores lower.
        p: exact two-sided p-value of the sign test, which is McNemar's exact test where scores are right or wrong.
    """

    difference: Interval
    higher: int
    lower: int
    p: float


def share(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """A share with its Wilson interval, which holds near 0 and 1 and for few items too.

    Raises:
        ValueError: not `0 <= successes <= n`, or nothing was counted.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"expected 0 <= successes <= n and n > 0, got {successes} of {n}")
    from scipy.stats import binomtest

    found = binomtest(int(successes), int(n)).proportion_ci(level, method="wilson")
    return Interval(successes / n, float(found.low), float(found.high), int(n), "Wilson")


def bootstrap(
    statistic: Statistic,
    *columns: Sequence[float] | np.ndarray,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """A statistic with its bootstrap interval; items are drawn whole, with all their columns.

    The interval is BCa (bias-corrected and accelerated) up to 2,000 items, and of percentiles beyond, where the two agree.
    With fewer than about twenty items any bootstrap interval is too narrow (at 8 items a nominal 95% is about 88%).

    Args:
        statistic: vectorised, see `Statistic`; must be finite on every resample.
        columns: what is known of the items, one value an item each.
        seed: of the resampling.
        level: of confidence.
        resamples: how many.

    Raises:
        ValueError: no items, or columns of different lengths.
    """
    from scipy import stats

    arrays = [np.asarray(column, dtype=float) for column in columns]
    n = len(arrays[0]) if arrays else 0
    if n == 0 or any(array.shape != (n,) for array in arrays):
        raise ValueError(f"expected columns of one length, at least 1, got {[array.shape for array in arrays]}")
    value = float(statistic(*arrays, axis=-1))
    if n == 1:
        return Interval(value, -math.inf, math.inf, 1, "none: one item")
    if all(np.ptp(array) == 0 for array in arrays):
        return Interval(value, value, value, n, "none: all items are alike")
    methods = ("BCa", "percentile") if n <= LARGEST_BCA else ("percentile",)
    found: Any = None
    method = ""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        # Resamples that are all alike have no BCa interval; percentiles are taken then.
        warnings.simplefilter("ignore")
        for method in methods:
            found = stats.bootstrap(
                arrays,
                statistic,
                n_resamples=resamples,
                batch=max(1, _BLOCK // n),
                vectorized=True,
                paired=len(arrays) > 1,
                confidence_level=level,
                method=method,
                rng=np.random.default_rng(seed),
            ).confidence_interval
            if math.isfinite(found.low) and math.isfinite(found.high):
                break
    # BCa may leave the value itself out by a rounding error, or on very skewed data.
    return Interval(value, min(float(found.low), value), max(float(found.high), value), n, f"bootstrap ({method})")


def mean(values: Sequence[float] | np.ndarray, *, seed: int = 0) -> Interval:
    """A mean with its bootstrap interval."""
    return bootstrap(np.mean, values, seed=seed)


def median(values: Sequence[float] | np.ndarray, *, seed: int = 0) -> Interval:
    """A median with its bootstrap interval, of percentiles: BCa's jackknife is no use on a median."""
    array = np.asarray(values, dtype=float)
    if len(array) < 2:
        return bootstrap(np.median, array, seed=seed)
    drawn = np.random.default_rng(seed)
    found = [float(np.median(array[drawn.integers(0, len(array), len(array))])) for _ in range(RESAMPLES // 2)]
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(float(np.median(array)), float(low), float(high), len(array), "bootstrap (percentile)")


def ratio(above: Sequence[float] | np.ndarray, below: Sequence[float] | np.ndarray, *, seed: int = 0) -> Interval:
    """Sum over sum, with its bootstrap interval over items.

    Infinite where `below` sums to 0; an upper end is infinite where the interval of the inverse ratio reaches 0.

    Args:
        above: one value an item, not negative, such as its seconds.
        below: one value an item, not negative, such as whether it was solved.
        seed: of the resampling.

    Raises:
        ValueError: a negative value, or nothing at all above.
    """
    top, bottom = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    if (top < 0).any() or (bottom < 0).any() or top.sum() == 0:
        raise ValueError("expected values that are not negative, and some above the line")
    if bottom.sum() == 0:
        return Interval(math.inf, -math.inf, math.inf, len(top), "none: nothing below the line")

    # Inverted, because a resample may have nothing below the line: a rate of 0 is a number, its inverse is none.
    def rate(a: np.ndarray, b: np.ndarray, axis: int) -> Any:
        return b.sum(axis) / np.maximum(a.sum(axis), 1e-300)

    found = bootstrap(rate, top, bottom, seed=seed)

    def inverse(x: float) -> float:
        return math.inf if x <= 0 else 1 / x

    high = math.inf if math.isinf(found.low) else inverse(found.low)
    low = 0.0 if math.isinf(found.high) else inverse(found.high)
    value = float(top.sum() / bottom.sum())
    return Interval(value, min(low, value), max(high, value), len(top), found.method)


def resampled(
    items: Sequence[Any], statistic: Callable[[list[Any]], float], *, seed: int = 0, resamples: int = 200
) -> Interval:
    """Any statistic of any items (F1 of pairs, corpus BLEU), with a percentile bootstrap interval; slow, so few resamples."""
    value = float(statistic(list(items)))
    n = len(items)
    if n < 2:
        return Interval(value, -math.inf, math.inf, n, "none: one item")
    drawn = np.random.default_rng(seed)
    found = [float(statistic([items[i] for i in drawn.integers(0, n, n)])) for _ in range(resamples)]
    found = [x for x in found if not math.isnan(x)]
    if not found or math.isnan(value):
        return Interval(value, -math.inf, math.inf, n, "none: not a number")
    low, high = np.quantile(found, [0.025, 0.975], method="nearest")
    return Interval(value, min(float(low), value), max(float(high), value), n, "bootstrap (percentile)")


def weighted_mean(values: Sequence[float], weights: Sequence[float] | None = None, *, level: float = 0.95) -> Interval:
    """A weighted mean with its t interval: good for few items (windows, seeds) that are roughly normal.

    The standard error is that of a ratio estimator (linearised), so that items of unequal weight count as they should; with
    equal weights it is the textbook t interval.

    Args:
        values: one an item.
        weights: how much each counts; equal by default. Items without weight are left out.
        level: of confidence.

    Raises:
        ValueError: no item has any weight.
    """
    found = np.asarray(values, dtype=float)
    w = np.ones_like(found) if weights is None else np.asarray(weights, dtype=float)
    found, w = found[w > 0], w[w > 0]
    n = len(found)
    if n == 0:
        raise ValueError("expected at least one item with weight, got none")
    value = math.fsum(found * w) / math.fsum(w)
    if n == 1:
        return Interval(value, -math.inf, math.inf, 1, "none: one item")
    from scipy.stats import t

    residuals = w * (found - value) / w.mean()
    error = math.sqrt(float((residuals**2).sum()) / (n - 1) / n)
    half = float(t.ppf((1 + level) / 2, n - 1)) * error
    return Interval(value, value - half, value + half, n, "t")


def over_seeds(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """The mean of runs that differ in their seed, with its t interval.

    It says where the mean of very many seeds would lie, if results are roughly normal; not where the next run will. With 3 seeds
    the interval is 2.5 standard deviations to either side, with 5 it is 1.2. It knows nothing of the evaluation's own items: the
    runs of one study share them.

    Raises:
        ValueError: no run.
    """
    return weighted_mean(values, level=level)


def compare(first: Mapping[str, float], second: Mapping[str, float], *, seed: int = 0) -> Paired:
    """Compare two arms on the items that they share.

    Args:
        first: item -> score of the arm to compare with.
        second: item -> score of the other arm.
        seed: of the resampling.

    Raises:
        ValueError: the arms share no item.
    """
    names = sorted(first.keys() & second.keys())
    if not names:
        raise ValueError("expected arms with items in common, got none: they were measured on other data")
    from scipy.stats import binomtest

    differences = np.array([second[name] - first[name] for name in names])
    higher, lower = int((differences > 0).sum()), int((differences < 0).sum())
    p = float(binomtest(min(higher, lower), higher + lower).pvalue) if higher + lower else 1.0
    return Paired(mean(differences, seed=seed), higher, lower, p)
