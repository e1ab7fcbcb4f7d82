"""Signed-rank intervals against the published table, and what they are called."""

import itertools
import math
import random

import pytest

from sinkprune_plugin.verification.speed_verdict import (
    LEAST_REPETITIONS,
    Interval,
    judge,
    ratio_interval,
    signed_rank_interval,
)

# Largest T that is significant, two-sided: Wilcoxon's table, as in Hollander et al. and most textbooks.
TABLE = {
    0.95: {6: 0, 7: 2, 8: 3, 9: 5, 10: 8, 12: 13, 15: 25, 20: 52},
    0.99: {8: 0, 9: 1, 10: 3, 12: 7, 15: 15, 16: 19, 20: 37, 25: 68},
}


@pytest.mark.parametrize(
    ("confidence", "number", "critical"),
    [(level, number, critical) for level, rows in TABLE.items() for number, critical in rows.items()],
)
def test_ends_are_those_of_the_table(confidence, number, critical):
    values = random.Random(0).sample(range(-(10**6), 10**6), number)
    means = sorted((a + b) / 2 for a, b in itertools.combinations_with_replacement(values, 2))
    assert signed_rank_interval(values, confidence)[1:] == (means[critical], means[-1 - critical])


def test_the_estimate_is_the_median_of_pairwise_means():
    # Means of pairs: 0, 0.5, 1, 3, 3.5, 6.
    assert signed_rank_interval([0.0, 1.0, 6.0], 0.5)[0] == 2.0


def test_too_few_repetitions_give_no_interval():
    assert signed_rank_interval([0.1] * 7, 0.99)[1:] == (-math.inf, math.inf)
    interval = ratio_interval([0.1] * 7)
    assert (interval.low, interval.high) == (0, math.inf)
    assert judge(interval) == "no measurable difference"


@pytest.mark.parametrize("wrong", [math.log(5), -math.log(5)])
def test_one_disturbed_repetition_leaves_the_ends_within_the_others(wrong):
    quiet = [math.log(1.25) + 0.001 * number for number in range(-7, LEAST_REPETITIONS - 7)]
    for place in range(LEAST_REPETITIONS):
        disturbed = [*quiet[:place], wrong, *quiet[place + 1 :]]
        found = ratio_interval(disturbed)
        assert found.ratio == pytest.approx(1.25, rel=0.002)
        assert math.exp(min(quiet)) <= found.low
        assert found.high <= math.exp(max(quiet))
    # One repetition fewer doesn't have that property.
    found = ratio_interval([wrong, *quiet[2:]])
    assert found.low < math.exp(min(quiet)) or found.high > math.exp(max(quiet))


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.021, 1.2, "faster"),
        (1.02, 1.2, "no measurable difference"),
        (1.001, 1.01, "no measurable difference"),
        (0.9, 1.1, "no measurable difference"),
        (0.9, 0.981, "no measurable difference"),
        (0.9, 0.98, "slower"),
    ],
)
def test_the_whole_interval_must_lie_beyond_the_smallest_difference(low, high, verdict):
    assert judge(Interval(1.0, low, high)) == verdict
