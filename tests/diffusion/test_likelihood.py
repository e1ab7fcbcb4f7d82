import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sinkprune_plugin.diffusion import (
    elbo_perplexity,
    mask_probability,
    masked_token_perplexity,
    measure_likelihood,
    perplexity_on,
    resolve_diffusion,
)
from sinkprune_plugin.diffusion.estimates import RowScores, estimate_likelihood
from sinkprune_plugin.diffusion.likelihood import _stratified_timesteps
from sinkprune_plugin.errors import UsageError

GOLDEN = Path(__file__).parent.parent / "fixtures" / "golden"
TINY_LLADA = Path(__file__).parent.parent.parent / "sinkprune_plugin" / "assets" / "tiny-llada"
MASK = 4
# Larger than in use: with eps = 1e-3 the 1 / p_mask tails would need far more noise samples for the same precision.
EPS = 0.1
LLADA = {"model_type": "llada", "vocab_size": 5, "mask_token_id": MASK}
DREAM = {"model_type": "Dream", "vocab_size": 5, "mask_token_id": MASK}


class Toy(torch.nn.Module):
    """Every position looks at every token, with a position-dependent table: small enough to enumerate its noise."""

    def __init__(self, config, length, seed=0):
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        # from position, from token, to position → logits
        self.table = torch.nn.Parameter(torch.randn(length, 5, length, 5, generator=generator))
        self.batches: list[int] = []
        self.modes: list[bool] = []

    def forward(self, input_ids, attention_mask=None):
        self.batches.append(len(input_ids))
        self.modes.append(self.training)
        places = torch.arange(input_ids.shape[1])
        return SimpleNamespace(logits=self.table[places, input_ids].sum(dim=1))


class EachTokenAlone(torch.nn.Module):
    """Predicts from the position's own input, blind to padding and neighbours."""

    def __init__(self):
        super().__init__()
        self.config = LLADA
        self.table = torch.nn.Parameter(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))
        self.masks: list[torch.Tensor | None] = []

    def forward(self, input_ids, attention_mask=None):
        self.masks.append(attention_mask)
        return SimpleNamespace(logits=self.table[input_ids])


def all_windows(length):
    return torch.tensor(list(itertools.product(range(4), repeat=length)))


def exact_negative_elbo(model, window, spec):
    """E over t and over every corruption pattern of Σ ce / p_mask, nats of the whole window; plain loops in float64."""
    length = len(window)
    free = range(1, length - 1) if spec.keep_first else range(length)
    # The expectation is a polynomial in p of degree < 8 and p is linear in t, so 8 Gauss-Legendre nodes are exact.
    nodes, weights = np.polynomial.legendre.leggauss(8)
    total = 0.0
    for pattern in itertools.product([False, True], repeat=len(free)):
        hidden = [i for i, is_hidden in zip(free, pattern, strict=True) if is_hidden]
        if not hidden:
            continue
        noisy = window.clone()
        noisy[hidden] = MASK
        with torch.no_grad():
            log_p = model(noisy[None]).logits[0].double().log_softmax(dim=-1)
        loss = -sum(log_p[i - spec.logit_shift, window[i]].item() for i in hidden)
        for node, weight in zip(nodes, weights, strict=True):
            p = mask_probability((node + 1) / 2, EPS)
            total += weight / 2 * p ** len(hidden) * (1 - p) ** (len(free) - len(hidden)) * loss / p
    return total


@pytest.mark.parametrize("control_variate", [False, True])
@pytest.mark.parametrize(("config", "length", "counted"), [(LLADA, 3, 3), (DREAM, 4, 2)])
def test_elbo_estimate_against_exact_enumeration(config, length, counted, control_variate):
    model = Toy(config, length)
    spec = resolve_diffusion(config)
    windows = all_windows(length)[:128]
    exact = sum(exact_negative_elbo(model, window, spec) for window in windows) / (len(windows) * counted)
    estimates = [
        elbo_perplexity(
            model,
            windows,
            num_samples=32,
            seed=seed,
            noise_eps=EPS,
            batch_size=4096,
            control_variate=control_variate,
        ).nll_per_token
        for seed in range(24)
    ]
    mean, deviation = np.mean(estimates), np.std(estimates, ddof=1) / math.sqrt(len(estimates))
    # Four standard errors of the mean over 24 seeds; the seeds are fixed, so this can't flake. The second line makes
    # sure that it can fail: the bound is below 2 % of the value.
    assert abs(mean - exact) < 4 * deviation
    assert 4 * deviation < 0.02 * exact


def test_control_variate_reduces_the_noise():
    model = Toy(LLADA, 3)
    windows = all_windows(3)

    def spread(control_variate):
        options = {"num_samples": 8, "batch_size": 4096, "control_variate": control_variate}
        values = [elbo_perplexity(model, windows, seed=seed, **options).nll_per_token for seed in range(24)]
        return np.std(values, ddof=1)

    # Measured: 0.54 on this toy, also about half on tiny-llada.
    assert spread(True) < 0.8 * spread(False)


@given(st.integers(1, 64), st.integers(0, 2**62))
@settings(deadline=None, max_examples=50)
def test_one_timestep_in_each_stratum(num_samples, seed):
    timesteps = _stratified_timesteps(num_samples, torch.Generator().manual_seed(seed))
    # Stratum k counted from the top is (1 - (k + 1) / K, 1 - k / K].
    assert [math.floor((1 - t) * num_samples + 1e-9) for t in timesteps] == list(range(num_samples))
    assert all(0 < t <= 1 for t in timesteps)


def test_timesteps_cover_their_stratum_evenly():
    draws = [_stratified_timesteps(2, torch.Generator().manual_seed(seed)) for seed in range(2000)]
    upper, lower = np.array(draws).T
    # Uniform on (0.5, 1]: standard deviation 0.144, so the mean of 2000 has a standard error of 0.0032; five of them.
    assert abs(upper.mean() - 0.75) < 0.016
    assert upper.min() < 0.505 < 0.995 < upper.max()
    assert np.allclose(upper - lower, 0.5, atol=1e-12)


def test_standard_error_is_the_spread_over_samples_of_windows():
    # Many small studies on different windows of a population: their spread is what each one's error predicts.
    model = Toy(LLADA, 6)
    generator = torch.Generator().manual_seed(1)
    runs = [
        elbo_perplexity(model, torch.randint(0, 4, (64, 6), generator=generator), num_samples=4, batch_size=4096)
        for _ in range(60)
    ]
    spread = np.std([run.perplexity for run in runs], ddof=1)
    predicted = np.mean([run.standard_error for run in runs])
    # A standard deviation from 60 draws has a relative error of 1/sqrt(2 · 59) = 9 %; three of them, and the mean
    # predicted error of heavy-tailed windows lies a few percent low.
    assert abs(predicted / spread - 1) < 0.33


def test_estimates_by_hand():
    # Two windows of 4 tokens, one sample each.
    scores = RowScores(
        nll=torch.tensor([[4.0], [3.0]]).double(),
        corrupted=torch.tensor([[2.0], [1.0]]).double(),
        p_mask=torch.tensor([[0.5], [0.25]]).double(),
        tokens=torch.tensor([4.0, 4.0]).double(),
    )
    plain = estimate_likelihood(scores, control_variate=False)
    # (4 / 0.5 + 3 / 0.25) / 8 tokens; window means 2 and 3, so the error of their mean is 0.5.
    assert plain.elbo.nll_per_token == 2.5
    assert math.isclose(plain.elbo.perplexity, math.exp(2.5))
    assert math.isclose(plain.elbo.standard_error, math.exp(2.5) * 0.5)
    assert (plain.elbo.num_tokens, plain.elbo.num_samples) == (8, 1)
    assert plain.masked_token.nll_per_token == 7 / 3
    assert plain.masked_token.num_tokens == 3
    # c = 3 for the first (the other's mean loss), 2 for the second: 8 + 3 (4 - 4) and 12 + 2 (4 - 4).
    assert estimate_likelihood(scores, control_variate=True).elbo.nll_per_token == 2.5
    uneven = RowScores(scores.nll, torch.tensor([[1.0], [1.0]]).double(), scores.p_mask, scores.tokens)
    # 8 + 3 (4 - 2) = 14 and 12 + 4 (4 - 4) = 12.
    assert estimate_likelihood(uneven, control_variate=True).elbo.nll_per_token == 26 / 8


def test_one_window_has_no_standard_error():
    estimate = elbo_perplexity(Toy(LLADA, 4), torch.tensor([[0, 1, 2, 3]]))
    assert math.isnan(estimate.standard_error)
    assert math.isfinite(estimate.perplexity)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batch_size_changes_nothing(batch_size):
    model = Toy(LLADA, 5)
    windows = all_windows(5)[::97]
    reference = measure_likelihood(model, windows, batch_size=7)
    model.batches.clear()
    result = measure_likelihood(model, windows, batch_size=batch_size)
    assert max(model.batches) <= batch_size
    # Sums in double of the same float32 losses, in the same order of rows.
    assert math.isclose(result.elbo.perplexity, reference.elbo.perplexity, rel_tol=1e-6)
    assert math.isclose(result.masked_token.perplexity, reference.masked_token.perplexity, rel_tol=1e-6)


def test_order_of_windows_changes_nothing():
    model = Toy(LLADA, 5)
    windows = all_windows(5)[::97]
    forward, backward = (measure_likelihood(model, w, seed=3) for w in (windows, windows.flip(0)))
    assert math.isclose(forward.elbo.perplexity, backward.elbo.perplexity, rel_tol=1e-6)


def test_both_functions_give_the_parts_of_the_measurement():
    model, windows = Toy(LLADA, 5), all_windows(5)[::97]
    both = measure_likelihood(model, windows, num_samples=4, seed=1)
    assert elbo_perplexity(model, windows, num_samples=4, seed=1) == both.elbo
    assert masked_token_perplexity(model, windows, num_samples=4, seed=1) == both.masked_token
    assert elbo_perplexity(model, windows, num_samples=4, seed=2) != both.elbo


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_neither_predicted_nor_counted(left):
    model = EachTokenAlone()
    windows = all_windows(6)[::301]
    pad = torch.zeros(len(windows), 3, dtype=torch.int64)
    padded = torch.cat([pad, windows] if left else [windows, pad], dim=1)
    mask = torch.cat([pad, torch.ones_like(windows)] if left else [torch.ones_like(windows), pad], dim=1)
    bare = measure_likelihood(model, windows)
    assert model.masks == [None] * len(model.masks), "no mask is passed where there is no padding"
    result = measure_likelihood(model, padded, attention_mask=mask)
    assert torch.equal(model.masks[-1][-1], mask[-1])
    assert result.elbo.num_tokens == windows.numel()
    # The same numbers summed in double.
    assert math.isclose(result.elbo.perplexity, bare.elbo.perplexity, rel_tol=1e-6)
    assert math.isclose(result.elbo.standard_error, bare.elbo.standard_error, rel_tol=1e-6)


def test_perplexity_on_recorded_noise_against_plain_loops():
    model = Toy(DREAM, 5)
    clean = all_windows(5)[::211]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(len(clean), 3, 5, generator=generator) < 0.5
    hidden[..., 0] = hidden[..., -1] = False
    # A version without any corrupted token adds nothing but its tokens.
    hidden[0, 0] = False
    noisy = torch.where(hidden, MASK, clean[:, None])
    p_mask = torch.rand(len(clean), 3, generator=generator)
    weighted = total = count = 0.0
    for n, r in itertools.product(range(len(clean)), range(3)):
        log_p = model(noisy[n, r][None]).logits[0].detach().double().log_softmax(dim=-1)
        for i in hidden[n, r].nonzero().flatten().tolist():
            weighted -= log_p[i - 1, clean[n, i]].item() / p_mask[n, r].item()
            total -= log_p[i - 1, clean[n, i]].item()
            count += 1
    elbo, masked = perplexity_on(model, clean.int(), noisy.int(), p_mask, batch_size=2)
    # float32 logits against float64 of the same; Dream's two kept tokens aren't counted.
    assert math.isclose(elbo, math.exp(weighted / (len(clean) * 3 * 3)), rel_tol=1e-5)
    assert math.isclose(masked, math.exp(total / count), rel_tol=1e-5)


def test_golden_perplexity_of_the_embedded_model():
    from transformers import AutoModelForCausalLM

    from sinkprune_plugin.models import register_configs, register_models

    register_configs()
    register_models()
    model = AutoModelForCausalLM.from_pretrained(TINY_LLADA, dtype=torch.float32)
    recorded = load_file(GOLDEN / "evaluation.safetensors")
    expected = json.loads((GOLDEN / "perplexity.json").read_text())["dense"]
    elbo, masked = perplexity_on(model, recorded["clean_ids"], recorded["noisy_ids"], recorded["p_mask"], batch_size=16)
    # The same weights and noise, another order of float32 operations: 1e-3 is far above what that moves (1e-7 measured)
    # and far below any other difference, one wrong epsilon included.
    assert math.isclose(elbo, expected["elbo_ppl"], rel_tol=1e-3)
    assert math.isclose(masked, expected["masked_token_ppl"], rel_tol=1e-3)


def test_the_model_runs_in_evaluation_mode_and_gets_its_mode_back():
    model = Toy(LLADA, 4).train()
    elbo_perplexity(model, all_windows(4)[:4])
    assert not any(model.modes)
    assert model.training
    elbo_perplexity(model.eval(), all_windows(4)[:4])
    assert not model.training


def test_no_gradient_and_no_global_randomness():
    model = Toy(LLADA, 4)
    state = torch.get_rng_state()
    elbo_perplexity(model, all_windows(4)[:4])
    assert model.table.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_logits_that_are_not_finite():
    model = Toy(LLADA, 4)
    with torch.no_grad():
        model.table[2, MASK] = math.nan
    with pytest.raises(UsageError, match="logits of Toy hold NaN or Inf in batch 0"):
        elbo_perplexity(model, all_windows(4)[:4])
    model.train()
    with pytest.raises(UsageError):
        elbo_perplexity(model, all_windows(4)[:4])
    assert model.training, "the mode comes back after an error too"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"input_ids": torch.zeros(4, dtype=torch.int64)}, r"input_ids has shape \(4,\)"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.int64)}, r"input_ids has shape \(0, 4\)"),
        ({"noise_eps": 1.0}, "noise_eps is 1.0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    arguments = {"input_ids": all_windows(4)[:4]} | options
    with pytest.raises(UsageError, match=message):
        elbo_perplexity(Toy(LLADA, 4), **arguments)


def test_nothing_to_predict():
    # Dream keeps both tokens of a window of two.
    with pytest.raises(UsageError, match="no token was corrupted"):
        elbo_perplexity(Toy(DREAM, 2), all_windows(2))


def test_unknown_model_and_recorded_shapes_that_do_not_fit():
    model = Toy(LLADA, 4)
    with pytest.raises(UsageError, match="don't fit together"):
        perplexity_on(model, torch.zeros(2, 4), torch.zeros(2, 3, 5), torch.zeros(2, 3))
    with pytest.raises(UsageError, match="don't fit together"):
        perplexity_on(model, torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 3))
    model.config = None
    with pytest.raises(UsageError, match="no known family"):
        elbo_perplexity(model, all_windows(4))
