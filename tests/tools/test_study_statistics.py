"""The statistics of the study: paired differences, their intervals, and what counts as clear."""

import math
import random
import statistics
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def maths(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import study_statistics

    yield study_statistics
    sys.modules.pop("study_statistics", None)


def test_differences_are_averaged_over_seeds_before_their_spread_is_taken(maths):
    first = [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    second = [[1.1, 2.4, 3.2], [1.3, 2.2, 3.0]]
    difference = maths.paired_difference(first, second)
    assert difference.mean == pytest.approx(0.2)
    assert difference.by_seed == pytest.approx((0.7 / 3, 0.5 / 3))
    spread = statistics.stdev([0.2, 0.3, 0.1])
    assert difference.error == pytest.approx(maths.student_quantile(2) * spread / math.sqrt(3))


def test_the_quantile_is_students(maths):
    def tail(freedom, quantile, steps=20000):
        # Plain midpoint rule over the density up to the quantile, from the middle.
        factor = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
        width = quantile / steps
        return (
            factor * width * sum((1 + ((k + 0.5) * width) ** 2 / freedom) ** (-(freedom + 1) / 2) for k in range(steps))
        )

    # The density at the quantile is 0.05, so 1e-4 in the quantile is 5e-6 in the probability.
    for freedom in (10, 23):
        assert tail(freedom, maths.student_quantile(freedom)) == pytest.approx(0.475, abs=1e-5)


def test_the_interval_agrees_with_a_bootstrap_over_windows(maths):
    random.seed(0)
    effect = [random.gauss(0.02, 0.03) for _ in range(24)]
    first = [[random.gauss(4, 0.5) for _ in range(24)] for _ in range(3)]
    second = [[a + e + random.gauss(0, 0.01) for a, e in zip(seed, effect, strict=True)] for seed in first]
    difference = maths.paired_difference(first, second)
    means = []
    for _ in range(4000):
        drawn = random.choices(range(24), k=24)
        means.append(statistics.fmean(second[s][w] - first[s][w] for s in range(3) for w in drawn))
    # The bootstrap lacks the factor 24/23 in the variance and Student's tail: 1.96 · √(23/24) / 2.069 = 0.93 of ours.
    # Its own noise with 4000 draws is 1.2 % (one standard error of a standard deviation), allowed three times.
    assert 1.96 * statistics.stdev(means) / difference.error == pytest.approx(0.93, abs=0.035)
    assert statistics.fmean(means) == pytest.approx(difference.mean, abs=0.001)


def test_the_interval_covers_what_it_should(maths):
    """95 % of the intervals hold the true difference, though the seeds of a window are alike."""
    draw = random.Random(1)
    zeros = [[0.0] * 24] * 3
    hits = naive_hits = 0
    for _ in range(1500):
        windows = [draw.gauss(0, 1) for _ in range(24)]
        runs = [[w + draw.gauss(0, 0.3) for w in windows] for _ in range(3)]
        difference = maths.paired_difference(zeros, runs)
        hits += abs(difference.mean) < difference.error
        everything = [loss for run in runs for loss in run]
        naive_hits += abs(difference.mean) < 1.96 * statistics.stdev(everything) / math.sqrt(72)
    # Three standard errors of a share of 0.95 in 1500: 0.017.
    assert hits / 1500 == pytest.approx(0.95, abs=0.017)
    # Treating the 72 losses as independent would be far off, so the simulation can tell.
    assert naive_hits / 1500 < 0.8


def test_clear_needs_the_interval_and_every_seed(maths):
    assert maths.Difference(0.02, 0.01, (0.01, 0.03, 0.02)).clear
    assert maths.Difference(-0.02, 0.01, (-0.01, -0.03, -0.02)).clear
    assert not maths.Difference(0.02, 0.03, (0.01, 0.03, 0.02)).clear
    assert not maths.Difference(0.02, 0.01, (-0.001, 0.04, 0.02)).clear


def test_a_difference_in_percent(maths):
    difference = maths.Difference(math.log(1.1), math.log(1.05), (0.1,))
    assert difference.percent == pytest.approx(10)
    assert difference.percent_ends == pytest.approx((100 * (1.1 / 1.05 - 1), 100 * (1.1 * 1.05 - 1)))
