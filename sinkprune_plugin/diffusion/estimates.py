"""From summed losses to perplexities with standard errors: the statistics of a Monte-Carlo likelihood."""

import math
from dataclasses import dataclass

import torch

from sinkprune_plugin.errors import UsageError

__all__ = ["Likelihood", "PerplexityEstimate", "RowScores", "estimate_likelihood"]

# exp() of more overflows a double.
_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class PerplexityEstimate:
    """A perplexity with its uncertainty.

    :param perplexity: exp of ``nll_per_token``
    :param standard_error: of ``perplexity``, from the spread between windows (delta method), so it covers both the
        noise and the choice of windows; nan for a single window
    :param nll_per_token: nats per token
    :param num_samples: noise samples for each window
    :param num_tokens: tokens that the mean is over
    """

    perplexity: float
    standard_error: float
    nll_per_token: float
    num_samples: int
    num_tokens: int


@dataclass(frozen=True)
class Likelihood:
    """Both perplexities from the same forward passes.

    :param elbo: ELBO perplexity, an upper bound on the true one
    :param masked_token: perplexity of corrupted tokens given the others, over all noise levels alike
    """

    elbo: PerplexityEstimate
    masked_token: PerplexityEstimate


@dataclass(frozen=True)
class RowScores:
    """Losses of N windows with K noise samples each.

    :param nll: (N, K) float64, sum of -log p over the corrupted tokens, nats
    :param corrupted: (N, K) float64, number of corrupted tokens
    :param p_mask: (N, K) float64, corruption probability
    :param tokens: (N,) float64, number of corruptible tokens of each window
    """

    nll: torch.Tensor
    corrupted: torch.Tensor
    p_mask: torch.Tensor
    tokens: torch.Tensor


def estimate_likelihood(scores: RowScores, *, control_variate: bool) -> Likelihood:
    """Combine the losses into both perplexities.

    The plain ELBO sample of a window is nll / p_mask. Most of its variance comes not from the model but from the number
    of corrupted tokens: at p = 0.01, one token more or less of 256 changes it by 100 losses. The control variate
    removes the known part, E[corrupted / p_mask] = tokens: (nll - c · corrupted) / p_mask + c · tokens has the same
    expectation for every c that doesn't depend on this window's noise. c is the mean loss of the *other* windows'
    corrupted tokens in the same stratum of t, so the estimate stays unbiased.

    :param scores: losses of all windows
    :param control_variate: reduce the variance of the ELBO; False gives the plain sum
    :return: both estimates
    :raises UsageError: if no token was corrupted
    """
    samples = scores.nll.shape[1]
    if scores.corrupted.sum() == 0:
        raise UsageError("no token was corrupted, so there is nothing to predict; use more windows or num_samples")
    weighted = scores.nll / scores.p_mask
    if control_variate:
        others_nll = scores.nll.sum(dim=0) - scores.nll
        others_corrupted = scores.corrupted.sum(dim=0) - scores.corrupted
        # With no corrupted token elsewhere the sum above is 0 as well, and c = 0 is the plain estimate.
        expected_loss = others_nll / others_corrupted.clamp(min=1)
        weighted = weighted + expected_loss * (scores.tokens[:, None] - scores.corrupted / scores.p_mask)
    elbo = _ratio_estimate(weighted.sum(dim=1), scores.tokens * samples, samples, round(scores.tokens.sum().item()))
    corrupted = scores.corrupted.sum(dim=1)
    masked = _ratio_estimate(scores.nll.sum(dim=1), corrupted, samples, round(corrupted.sum().item()))
    return Likelihood(elbo, masked)


def _ratio_estimate(sums: torch.Tensor, counts: torch.Tensor, samples: int, tokens: int) -> PerplexityEstimate:
    total = counts.sum().item()
    nll = sums.sum().item() / total
    windows = len(sums)
    error = math.nan
    if windows > 1:
        # Linearised variance of a ratio of sums, with the windows as independent units.
        residual = sums - nll * counts
        error = math.sqrt(windows / (windows - 1) * residual.square().sum().item()) / total
    perplexity = math.exp(nll) if nll < _LARGEST_EXPONENT else math.inf
    return PerplexityEstimate(perplexity, perplexity * error, nll, samples, tokens)
