"""Sink threshold, soft mask and scope, against hand-made numbers and numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.sinks import sink_threshold, soft_sink_mask, transient_sink_mask


def test_threshold_by_hand():
    # Mean 2, deviations -2, -2, -2, 6: population variance 12.
    mass = torch.tensor([[0.0, 0.0, 0.0, 8.0]])
    assert sink_threshold(mass, 1.0).item() == pytest.approx(2 + math.sqrt(12))
    mask = soft_sink_mask(mass, 1.0, 0.5)
    assert mask[0, 3].item() == pytest.approx(1 / (1 + math.exp(-0.5 * (6 - math.sqrt(12)))))
    assert mask[0, 0].item() == pytest.approx(1 / (1 + math.exp(0.5 * (2 + math.sqrt(12)))))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 4),
    tokens=st.integers(1, 60),
    sink_std=st.floats(0, 4),
    sink_alpha=st.floats(0.01, 20),
)
def test_equals_numpy_in_double_precision(seed, batch, tokens, sink_std, sink_alpha):
    mass = np.random.default_rng(seed).gamma(0.5, 20.0, (batch, tokens)).astype(np.float32)
    exact = mass.astype(np.float64)
    threshold = exact.mean(1) + sink_std * exact.std(1)
    torch.testing.assert_close(
        sink_threshold(torch.from_numpy(mass), sink_std), torch.from_numpy(threshold).float(), rtol=1e-5, atol=1e-5
    )  # float32 sums of 60 numbers
    expected = 1 / (1 + np.exp(-(sink_alpha * (exact - threshold[:, None])).clip(-30, 30)))
    # The sigmoid's slope is sink_alpha / 4 ≤ 5, times the threshold's rounding of about 1e-5 relative to masses ~100.
    np.testing.assert_allclose(soft_sink_mask(torch.from_numpy(mass), sink_std, sink_alpha), expected, atol=1e-3)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31), tokens=st.integers(2, 40), shares=st.lists(st.floats(0.1, 1), min_size=1, max_size=4)
)
def test_padding_changes_nothing(seed, tokens, shares):
    generator = torch.Generator().manual_seed(seed)
    mass = 50 * torch.rand(len(shares), tokens, generator=generator)
    valid = torch.stack([torch.randperm(tokens, generator=generator) < max(1, int(s * tokens)) for s in shares])
    mask = soft_sink_mask(mass.where(valid, torch.nan), valid=valid)
    for row in range(len(shares)):
        alone = soft_sink_mask(mass[row, valid[row]])
        # Summed in another order, and the slope at the threshold is 5/4 of a mass of about 50 in float32.
        torch.testing.assert_close(mask[row, valid[row]], alone, rtol=0, atol=1e-4)
        assert (mask[row, ~valid[row]] == 0).all()


def test_large_half_precision_mass_is_computed_in_float32():
    mass = torch.full((1, 300), 1000.0, dtype=torch.bfloat16)
    mass[0, 7] = 60000.0
    mask = soft_sink_mask(mass)
    assert mask.dtype == torch.float32
    assert mask[0].argmax() == 7
    assert mask.sum() == pytest.approx(1, abs=1e-6)


def test_nan_mass_is_not_hidden():
    assert soft_sink_mask(torch.tensor([[1.0, torch.nan, 2.0]])).isnan().all()


def test_transient_scope_spares_persistent_sinks():
    masks = torch.tensor([[1.0, 1.0, 0.0, 0.2], [1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.2], [1.0, 0.0, 1.0, 0.6]])
    expected = masks.clone()
    expected[:, 0] = 0  # at every timestep
    expected[:, 3] = 0  # mean of exactly one half
    assert torch.equal(transient_sink_mask(masks, 0.5), expected)
    assert torch.equal(transient_sink_mask(masks, 1.0)[:, 3], masks[:, 3])
    batched = transient_sink_mask(torch.stack([masks, masks.flip(1)]), 0.5)
    assert torch.equal(batched, torch.stack([expected, expected.flip(1)]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: soft_sink_mask(torch.ones(1, 4), sink_std=-1), "sink_std is -1"),
        (lambda: soft_sink_mask(torch.ones(1, 4), sink_std=math.nan), "sink_std is nan"),
        (lambda: soft_sink_mask(torch.ones(1, 4), sink_alpha=0), "sink_alpha is 0"),
        (lambda: soft_sink_mask(torch.ones(1, 4), valid=torch.ones(1, 3)), "valid has shape"),
        (lambda: transient_sink_mask(torch.ones(4)), r"masks have shape \(4,\)"),
        (lambda: transient_sink_mask(torch.ones(2, 4), 0), "sink_persistence is 0"),
        (lambda: transient_sink_mask(torch.ones(2, 4), 1.5), "sink_persistence is 1.5"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(UsageError, match=message):
        call()
