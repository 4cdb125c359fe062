"""Intervals and comparisons: against closed forms and scipy, and by how often they hold the truth."""

import math

import numpy as np
import pytest
from scipy import stats

from sparing.evaluate import statistics


def test_wilson_is_the_textbook_formula():
    z = stats.norm.ppf(0.975)
    for k, n in ((0, 10), (3, 10), (10, 10), (250, 1000)):
        p = k / n
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        found = statistics.share(k, n)
        assert (found.value, found.n, found.method) == (p, n, "Wilson")
        assert (found.low, found.high) == pytest.approx((centre - half, centre + half), abs=1e-12)


@pytest.mark.parametrize(("k", "n"), [(1, 0), (-1, 3), (4, 3)])
def test_wilson_refuses_what_is_no_share(k, n):
    with pytest.raises(ValueError, match="successes"):
        statistics.share(k, n)


def test_t_interval_is_scipys():
    values = [2.0, 3.5, 3.1, 2.2, 5.0]
    found = statistics.over_seeds(values)
    expected = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.value == pytest.approx(np.mean(values))
    # What the docstring says of three seeds.
    three = statistics.over_seeds([-1.0, 0.0, 1.0])
    assert three.high == pytest.approx(2.484, abs=1e-3)


def test_weights_count_and_items_without_weight_do_not():
    found = statistics.weighted_mean([1.0, 2.0, 9.0], [3, 1, 0])
    assert (found.value, found.n) == (1.25, 2)
    # Doubling every weight changes nothing.
    doubled = statistics.weighted_mean([1.0, 2.0, 9.0], [6, 2, 0])
    assert (doubled.low, doubled.high) == pytest.approx((found.low, found.high))
    one = statistics.weighted_mean([4.0])
    assert (one.value, one.low, one.high) == (4.0, -math.inf, math.inf)
    with pytest.raises(ValueError, match="weight"):
        statistics.weighted_mean([1.0], [0])


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = statistics.mean(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert found.method == "bootstrap (BCa)"
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05)
    assert statistics.mean(values) == found, "the same seed, another interval"
    assert statistics.mean(values, seed=1) != found


def test_many_items_take_percentiles():
    found = statistics.mean(np.random.default_rng(0).normal(0, 1, 3000))
    assert found.method == "bootstrap (percentile)"
    assert found.low < found.value < found.high


def test_bootstrap_of_a_constant_and_of_one_item():
    same = statistics.mean([2.0] * 5)
    assert (same.low, same.high) == (2.0, 2.0)
    one = statistics.mean([2.0])
    assert (one.low, one.high) == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="columns"):
        statistics.bootstrap(np.mean, [])


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(1)
    held = {"wilson": 0, "t": 0, "bootstrap": 0, "ratio": 0}
    times = 150
    for i in range(times):
        k = int(rng.binomial(30, 0.1))
        found = statistics.share(k, 30)
        held["wilson"] += found.low <= 0.1 <= found.high
        found = statistics.over_seeds(rng.normal(1, 1, 4).tolist())
        held["t"] += found.low <= 1 <= found.high
        found = statistics.bootstrap(np.mean, rng.exponential(1, 60), seed=i, resamples=400)
        held["bootstrap"] += found.low <= 1 <= found.high
        solved = rng.binomial(1, 0.4, 80)
        found = statistics.ratio(rng.exponential(2, 80), solved, seed=i)
        held["ratio"] += found.low <= 5 <= found.high
    # 95% of 150, and three standard errors below.
    assert {name: n for name, n in held.items() if n / times < 0.89} == {}
    assert held["t"] / times < 0.999


def test_ratio_without_anything_below_the_line_is_infinite():
    none = statistics.ratio([1.0, 2.0], [0, 0])
    assert none.value == math.inf
    rare = statistics.ratio([1.0] * 20, [1] + [0] * 19)
    assert rare.value == 20
    assert rare.high == math.inf, "a resample without the one solved item has no finite ratio"
    assert 0 < rare.low < 20
    with pytest.raises(ValueError, match="not negative"):
        statistics.ratio([-1.0], [1])


def test_median_and_any_statistic():
    values = np.random.default_rng(2).normal(0, 1, 201)
    found = statistics.median(values)
    assert found.low < np.median(values) == found.value < found.high
    pairs = [(1, 1), (1, 0), (0, 0), (1, 1), (0, 1)] * 8
    agree = statistics.resampled(pairs, lambda ps: sum(a == b for a, b in ps) / len(ps))
    assert agree.value == 0.6
    assert agree.low < 0.6 < agree.high


def test_compare_is_mcnemars_exact_test():
    first = {str(i): float(i < 10) for i in range(40)}
    second = {str(i): float(2 <= i < 18) for i in range(40)}
    found = statistics.compare(first, {**second, "elsewhere": 1.0})
    assert (found.higher, found.lower, found.difference.n) == (8, 2, 40)
    # Exact: twice the lower tail of a fair coin.
    assert found.p == pytest.approx(2 * sum(math.comb(10, k) for k in range(3)) / 2**10)
    assert found.difference.value == pytest.approx(6 / 40)
    assert found.difference.low < 6 / 40 < found.difference.high
    same = statistics.compare(first, first)
    assert (same.p, same.difference.value) == (1.0, 0.0)
    with pytest.raises(ValueError, match="in common"):
        statistics.compare(first, {"elsewhere": 1.0})


def test_pairing_sees_what_unpaired_intervals_do_not():
    rng = np.random.default_rng(3)
    base = rng.normal(0, 10, 100)
    first = {str(i): float(x) for i, x in enumerate(base)}
    second = {name: x + 0.5 + float(rng.normal(0, 0.5)) for name, x in first.items()}
    found = statistics.compare(first, second)
    assert found.difference.low > 0
    assert found.p < 0.001
    assert statistics.mean(list(first.values())).high > statistics.mean(list(second.values())).low
