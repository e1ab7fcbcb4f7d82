"""Limits that a pruned model must meet, set by the user."""

import math
from dataclasses import dataclass
from typing import Any

from sinkprune_plugin.errors import UsageError

__all__ = ["BarResult", "Bars", "check_bars"]


@dataclass(frozen=True)
class Bars:
    """Limits; None sets none.

    :param max_ppl_increase: highest increase of the ELBO perplexity, in percent
    :param min_agreement: lowest share of tokens at which greedy answers agree, 0 to 1
    :param max_size_ratio: highest size of the weight files, as a share of the dense model's
    :param min_speedup: lowest ratio of the speeds that must be certain: the lower end of the measured interval is
        compared with it, so that neither luck nor a noisy machine can pass for speed
    """

    max_ppl_increase: float | None = None
    min_agreement: float | None = None
    max_size_ratio: float | None = None
    min_speedup: float | None = None

    def check(self) -> None:
        """Check the limits themselves.

        :raises UsageError: naming the option and its value
        """
        for option, value, low, high in (
            ("--max-ppl-increase", self.max_ppl_increase, -100.0, math.inf),
            ("--min-agreement", self.min_agreement, 0.0, 1.0),
            ("--max-size-ratio", self.max_size_ratio, 0.0, math.inf),
            ("--min-speedup", self.min_speedup, 0.0, math.inf),
        ):
            if value is not None and not low <= value <= high:
                raise UsageError(f"{option} {value} is out of range; use a number from {low:g} to {high:g}")


@dataclass(frozen=True)
class BarResult:
    """One limit and the measured value.

    :param name: the option's name
    :param limit: the user's limit
    :param value: what was measured
    :param passed: whether the limit is met
    """

    name: str
    limit: float
    value: float
    passed: bool


def check_bars(bars: Bars, content: dict[str, Any]) -> list[BarResult]:
    """Compare measurements with the limits.

    :param bars: limits
    :param content: a report
    :return: one result for each limit that was set
    """
    results = []
    if bars.max_ppl_increase is not None:
        value = content["quality"]["increase_percent"]
        results.append(BarResult("max-ppl-increase", bars.max_ppl_increase, value, value <= bars.max_ppl_increase))
    if bars.min_agreement is not None:
        value = content["samples"]["agreement"]
        results.append(BarResult("min-agreement", bars.min_agreement, value, value >= bars.min_agreement))
    if bars.max_size_ratio is not None:
        value = content["size"]["file_ratio"]
        results.append(BarResult("max-size-ratio", bars.max_size_ratio, value, value <= bars.max_size_ratio))
    if bars.min_speedup is not None:
        value = content["speed"]["ratio_low"]
        results.append(BarResult("min-speedup", bars.min_speedup, value, value >= bars.min_speedup))
    return results
