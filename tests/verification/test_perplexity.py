"""The difference of two models' losses, and its interval, against plain references."""

import math

import pytest
import torch

from sinkprune_plugin.diffusion import RowScores
from sinkprune_plugin.verification.perplexity import paired_difference


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
