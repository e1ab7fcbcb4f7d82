"""The statistics of a verification against plain references."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkprune_plugin.diffusion import RowScores
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.verification.bars import Bars, check_bars
from sinkprune_plugin.verification.perplexity import paired_difference
from sinkprune_plugin.verification.samples import distinct_n, repetition
from sinkprune_plugin.verification.speed import Workload, compare_speed


def scores(nll, seed=0):
    """Losses (N, K) with one token corrupted with probability 1 each, so that sums are plain."""
    nll = torch.as_tensor(nll, dtype=torch.float64)
    return RowScores(nll, torch.ones_like(nll), torch.ones_like(nll), torch.full((len(nll),), 10.0).double())


def test_difference_is_the_mean_over_tokens_and_its_interval_that_of_paired_windows():
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(12, 4, generator=generator, dtype=torch.float64) * 50
    pruned = dense + 1 + 0.5 * torch.randn(12, 4, generator=generator, dtype=torch.float64)
    difference, low, high = paired_difference(scores(dense), scores(pruned))
    per_window = (pruned - dense).sum(dim=1) / 40
    assert difference == pytest.approx(per_window.mean().item(), rel=1e-12)
    # Equal counts: the ratio's error is the standard error of the windows' mean.
    error = per_window.std().item() / math.sqrt(12)
    assert (low, high) == pytest.approx((difference - 1.96 * error, difference + 1.96 * error), rel=1e-12)


def test_what_both_models_share_cancels():
    easy, hard = torch.zeros(8, 2), torch.full((8, 2), 1000.0)
    text = torch.cat([easy, hard])
    difference, low, high = paired_difference(scores(text), scores(text + 3))
    assert difference == pytest.approx(0.3)
    assert high - low == pytest.approx(0, abs=1e-12)


def test_one_window_has_no_interval():
    assert paired_difference(scores([[1.0]]), scores([[2.0]])) == (0.1, -math.inf, math.inf)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """400 experiments of 24 windows with a known mean: 95 % ± 4 standard errors of a binomial, 4.4 %."""
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(400):
        dense = torch.rand(24, 2, generator=generator, dtype=torch.float64)
        pruned = dense + 0.2 + torch.randn(24, 2, generator=generator, dtype=torch.float64)
        _, low, high = paired_difference(scores(dense), scores(pruned))
        covered += low <= 0.02 <= high
    assert 0.906 <= covered / 400 <= 0.994


@given(st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=5), st.integers(1, 4))
@settings(deadline=None, max_examples=200)
def test_distinct_and_repetition_against_counting(answers, n):
    grams, again = [], 0
    for answer in answers:
        seen = []
        for start in range(len(answer)):
            gram = answer[start : start + n]
            if len(gram) < n:
                continue
            again += gram in seen
            seen.append(gram)
        grams += seen
    unique = []
    for gram in grams:
        if gram not in unique:
            unique.append(gram)
    assert distinct_n(answers, n) == pytest.approx(len(unique) / len(grams) if grams else 0)
    assert repetition(answers, n) == pytest.approx(again / len(grams) if grams else 0)


CONTENT = {"quality": {"increase_percent": 4.0}, "samples": {"agreement": 0.5}, "size": {"file_ratio": 0.6}}


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
        (Bars(5, 0.6, 0.7), [True, False, True]),
    ],
)
def test_each_bar_says_whether_it_is_met(bars, passed):
    assert [result.passed for result in check_bars(bars, CONTENT)] == passed


@pytest.mark.parametrize(
    ("bars", "message"),
    [
        (Bars(min_agreement=1.5), "--min-agreement 1.5 is out of range"),
        (Bars(max_size_ratio=-1.0), "--max-size-ratio -1.0 is out of range"),
        (Bars(max_ppl_increase=float("nan")), "--max-ppl-increase nan is out of range"),
    ],
)
def test_bars_out_of_range_are_refused(bars, message):
    with pytest.raises(UsageError, match=message):
        bars.check()


def test_names_of_module_types_are_no_formulas(tmp_path):
    from matplotlib.figure import Figure

    from sinkprune_plugin.verification.plots import _sparsity

    figure = Figure()
    name = "a$_$b"
    _sparsity(figure.subplots(), {"sparsity": {"by_type": {name: {}}, "by_block": {"0": {name: {"sparsity": 0.5}}}}})
    figure.savefig(tmp_path / "sparsity.png")


class FakeClock:
    """A sampler whose time is what it is told; only the clock is not real."""

    def __init__(self, clock, seconds, share):
        self.clock, self.seconds, self.share = clock, seconds, share
        self.forward_seconds = 0.0
        self.calls = []

    def __call__(self, prompts, workload, cache):
        self.calls.append((len(prompts), cache))
        taken = self.seconds.pop(0)
        self.clock[0] += taken
        self.forward_seconds += taken * self.share


def test_speed_takes_medians_of_rounds_side_by_side(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("sinkprune_plugin.verification.speed.time.perf_counter", lambda: clock[0])
    dense = FakeClock(clock, [9.0, 2.0, 4.0, 6.0], 0.5)
    pruned = FakeClock(clock, [9.0, 1.0, 1.0, 6.0], 0.25)
    workload = Workload(torch.zeros(4, 3, dtype=torch.long), gen_length=8, steps=4, batch_sizes=(2,), caches=("dual",))
    (row,) = compare_speed(dense, pruned, workload)
    assert dense.calls == pruned.calls == [(2, "dual")] * 4
    assert row.dense_tokens_per_s == 2 * 8 / 4.0
    assert row.pruned_tokens_per_s == 2 * 8 / 1.0
    assert (row.ratio, row.ratio_low, row.ratio_high) == (2.0, 1.0, 4.0)
    assert (row.dense_ms_per_step, row.pruned_ms_per_step) == (1000.0, 250.0)
    assert row.forward_share == 0.25


def test_agreement_along_the_trajectory():
    from sinkprune_plugin.verification.samples import _along

    mask = 9
    rng = random.Random(0)
    final = [rng.randrange(5) for _ in range(10)]
    # Both write one token a step from the left; the second errs at the last five.
    dense = torch.tensor([[final[: step + 1] + [mask] * (9 - step) for step in range(10)]])
    pruned = dense.clone()
    pruned[0, :, 5:] = torch.where(pruned[0, :, 5:] == mask, mask, 7)
    expected = [1.0] * 5 + [5 / (6 + step) for step in range(5)]
    assert _along(dense, pruned, mask) == pytest.approx(expected)
