"""Limits of a verification: which are met, and which can't be asked for."""

import pytest

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.verification.bars import Bars, check_bars

CONTENT = {
    "quality": {"increase_percent": 4.0},
    "samples": {"agreement": 0.5},
    "size": {"file_ratio": 0.6},
    "speed": {"ratio": 1.4, "ratio_low": 1.3},
}


@pytest.mark.parametrize(
    ("bars", "passed"),
    [
        (Bars(), []),
        (Bars(max_ppl_increase=4.0), [True]),
        (Bars(max_ppl_increase=3.9), [False]),
        (Bars(min_agreement=0.5), [True]),
        (Bars(min_agreement=0.51), [False]),
        (Bars(max_size_ratio=0.6), [True]),
        (Bars(max_size_ratio=0.59), [False]),
        (Bars(min_speedup=1.3), [True]),
        # The estimate reaches it, the interval doesn't.
        (Bars(min_speedup=1.31), [False]),
        (Bars(5, 0.6, 0.7, 1.0), [True, False, True, True]),
    ],
)
def test_each_bar_says_whether_it_is_met(bars, passed):
    assert [result.passed for result in check_bars(bars, CONTENT)] == passed


@pytest.mark.parametrize(
    ("bars", "message"),
    [
        (Bars(min_agreement=1.5), "--min-agreement 1.5 is out of range"),
        (Bars(max_size_ratio=-1.0), "--max-size-ratio -1.0 is out of range"),
        (Bars(min_speedup=-0.5), "--min-speedup -0.5 is out of range"),
        (Bars(max_ppl_increase=float("nan")), "--max-ppl-increase nan is out of range"),
    ],
)
def test_bars_out_of_range_are_refused(bars, message):
    with pytest.raises(UsageError, match=message):
        bars.check()
