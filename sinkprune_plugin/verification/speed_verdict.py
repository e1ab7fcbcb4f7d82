"""Is one model faster than another? The answer from paired runs on a machine that others use too.

A repetition is one number: the log of the ratio of two times, averaged over the workloads. Which of the two models runs
first is drawn anew each time ("randomized multiple interleaved trials", Abedi and Brecht, ICPE 2017,
doi:10.1145/3030207.3030229). If both models are equally fast, swapping their names changes nothing but the sign of that
number, so all signs are equally likely, however the machine drifts and whoever else uses it: Wilcoxon's signed-rank
test is then exact, as a randomisation test. Its inversion is the interval used here. The Hodges-Lehmann estimate lies
inside it: the median of the means of all pairs of repetitions, which disturbed repetitions can't move far as long as
they are fewer than 29 % (Hodges and Lehmann, Annals of Mathematical Statistics 34, 1963; Hollander, Wolfe and Chicken,
Nonparametric Statistical Methods, 3rd edition, sections 3.2 and 3.3). A t interval would be widened, and its centre
moved, by every burst of load; minimum times are no help where the machine is never quiet; the sign test's interval is a
quarter wider where single runs are noisy.
"""

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "CONFIDENCE",
    "LEAST_REPETITIONS",
    "NO_DIFFERENCE",
    "SMALLEST_DIFFERENCE",
    "Interval",
    "Verdict",
    "judge",
    "ratio_interval",
    "signed_rank_interval",
]

CONFIDENCE = 0.99
"""Two models of equal speed are told apart in at most one comparison of a hundred."""

SMALLEST_DIFFERENCE = 0.02
"""Differences below it aren't called one. Two copies of one model may differ a little for as long as they are in
memory, because of where their weights lie (Mytkowicz et al., ASPLOS 2009), and repetitions don't average that out."""

LEAST_REPETITIONS = 15
"""From fifteen on, the ends of the 99 % interval stay where they are, however far off a single repetition is: its means
with all fifteen are the fifteen that lie outside. Below eight there is no 99 % interval."""

Verdict = Literal["faster", "slower", "no measurable difference"]
NO_DIFFERENCE: Verdict = "no measurable difference"


@dataclass(frozen=True)
class Interval:
    """How many times as fast the second model is.

    :param ratio: Hodges-Lehmann estimate of the speeds' ratio
    :param low: lower end of the interval; 0 if there are too few repetitions for one
    :param high: upper end; infinite in that case
    """

    ratio: float
    low: float
    high: float


def ratio_interval(log_ratios: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Ratio of two speeds from the log ratios of single repetitions.

    :param log_ratios: log(seconds of the first model / seconds of the second), one for each repetition
    :param confidence: of the interval
    :return: the ratio with its interval
    """
    middle, low, high = signed_rank_interval(log_ratios, confidence)
    return Interval(math.exp(middle), math.exp(low), math.exp(high))


def judge(interval: Interval) -> Verdict:
    """Name what an interval shows.

    :param interval: of the ratio of the speeds
    :return: ``faster`` or ``slower`` if the whole interval lies beyond :data:`SMALLEST_DIFFERENCE`
    """
    if interval.low > 1 + SMALLEST_DIFFERENCE:
        return "faster"
    if interval.high < 1 / (1 + SMALLEST_DIFFERENCE):
        return "slower"
    return NO_DIFFERENCE


def signed_rank_interval(values: Sequence[float], confidence: float) -> tuple[float, float, float]:
    """Centre of a symmetric distribution with its exact interval, by the signed-rank test (Hollander et al., 3.27).

    :param values: independent measurements, at least one
    :param confidence: least probability with which the interval holds the centre, 0 to 1
    :return: Hodges-Lehmann estimate, lower and upper end; infinite ends if there are too few values
    """
    number = len(values)
    means = sorted((values[i] + values[j]) / 2 for i in range(number) for j in range(i, number))
    outside = _excluded(number, confidence)
    if outside == 0:
        return statistics.median(means), -math.inf, math.inf
    return statistics.median(means), means[outside - 1], means[-outside]


@functools.cache
def _excluded(number: int, confidence: float) -> int:
    """The largest c for which the signed-rank statistic is below c with at most half of the error's probability."""
    # ways[s]: sets of ranks with the sum s; each of the 2^number sets is equally likely.
    ways = [1]
    for rank in range(1, number + 1):
        longer = ways + [0] * rank
        for total, count in enumerate(ways):
            longer[total + rank] += count
        ways = longer
    allowed = (1 - confidence) / 2 * 2**number
    below, found = 0, 0
    while below + ways[found] <= allowed:
        below += ways[found]
        found += 1
    return found
