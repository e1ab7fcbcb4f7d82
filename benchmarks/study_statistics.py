"""Paired differences of window losses with confidence intervals."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Difference", "Windows", "in_percent", "in_words", "paired_difference", "perplexity", "student_quantile"]

# Nats per token of each test window.
Windows = Sequence[float]


@dataclass(frozen=True)
class Difference:
    """How much more one method loses than another, in nats per token.

    :param mean: mean over windows and seeds
    :param error: half the width of its 95 % confidence interval
    :param by_seed: mean over windows for each seed
    """

    mean: float
    error: float
    by_seed: tuple[float, ...]

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero and no seed has the opposite sign.

        The interval is one over texts. With three seeds it can't be one over seeds too, so they have to agree.
        """
        same_sign = all(seed > 0 for seed in self.by_seed) or all(seed < 0 for seed in self.by_seed)
        return abs(self.mean) > self.error and same_sign

    @property
    def percent(self) -> float:
        """The difference as a change of the perplexity."""
        return 100 * math.expm1(self.mean)

    @property
    def percent_ends(self) -> tuple[float, float]:
        """Both ends of the interval as changes of the perplexity."""
        return 100 * math.expm1(self.mean - self.error), 100 * math.expm1(self.mean + self.error)


def in_percent(difference: Difference) -> dict[str, list[float]]:
    """A difference as a benchmark's row has it: with the ends of its interval, and for each seed."""
    low, high = difference.percent_ends
    return {
        "percent": [round(value, 1) for value in (difference.percent, low, high)],
        "percent_of_seeds": [round(100 * math.expm1(each), 1) for each in difference.by_seed],
    }


def in_words(difference: Difference) -> str:
    """A difference as a benchmark prints it."""
    (low, high), by_seed = difference.percent_ends, in_percent(difference)["percent_of_seeds"]
    return f"{difference.percent:+.1f} % ({low:+.1f} to {high:+.1f}; seeds {min(by_seed)} to {max(by_seed)})"


def paired_difference(first: Sequence[Windows], second: Sequence[Windows]) -> Difference:
    """Difference of two methods, second minus first, clustered by window.

    The seeds of one window share its text and the noise of its evaluation, so they aren't independent: their
    differences are averaged first, and the interval is Student's over the windows.

    :param first: window losses for each seed
    :param second: the same for the other method, in the same order of seeds and windows
    :return: the difference
    """
    differences = [[b - a for a, b in zip(*runs, strict=True)] for runs in zip(first, second, strict=True)]
    by_window = [statistics.fmean(window) for window in zip(*differences, strict=True)]
    number = len(by_window)
    error = math.inf
    if number > 1:
        error = student_quantile(number - 1) * statistics.stdev(by_window) / math.sqrt(number)
    return Difference(statistics.fmean(by_window), error, tuple(statistics.fmean(seed) for seed in differences))


def student_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t, by the Cornish-Fisher expansion around the normal one.

    :param freedom: degrees of freedom; good to four digits from 10 on
    """
    z = statistics.NormalDist().inv_cdf(0.975)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def perplexity(runs: Sequence[Windows]) -> float:
    """Perplexity over all windows and seeds.

    :param runs: window losses for each seed
    """
    return math.exp(statistics.fmean(loss for run in runs for loss in run))
