"""Movement of sinks over the steps, against numbers worked out by hand and a plain loop."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.sinks import sink_dynamics


def test_dynamics_of_four_positions_equal_those_counted_by_hand():
    # One sample, four steps, four positions: position 0 is a sink always, 2 once, 3 never though it leads once.
    mass = torch.tensor([[[6.0, 1, 1, 2], [6, 1, 1, 2], [2, 1, 6, 1], [2, 1, 1, 6]]])
    masks = torch.tensor([[[1.0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0.4]]])
    found = sink_dynamics(mass, masks)
    assert found.sinks_per_timestep == (1.0, 1.0, 2.0, 1.0)
    assert found.sink_mass_share == pytest.approx((0.6, 0.6, 0.8, 0.2))
    assert found.dominant_mass_share == pytest.approx((0.6, 0.6, 0.6, 0.6))
    assert found.dominant_positions == ((0, 0, 2, 3),)
    # Positions 0, 0, 2, 3: mean 5/4, variance 27/16, over 4².
    assert found.dominant_variance == pytest.approx(27 / 16 / 16)
    assert found.dominant_moves == pytest.approx(2 / 3)
    assert found.sinks_ever == 2
    assert found.persistence == pytest.approx((1 + 0.25) / 2)
    assert found.transient_share == 0.5
    assert sink_dynamics(mass, masks, sink_persistence=0.25).transient_share == 0


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    samples=st.integers(1, 4),
    steps=st.integers(1, 6),
    tokens=st.integers(1, 12),
    threshold=st.floats(0.05, 1),
)
def test_equals_a_plain_loop(seed, samples, steps, tokens, threshold):
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(samples, steps, tokens, generator=generator) + 0.01
    masks = torch.rand(samples, steps, tokens, generator=generator)
    found = sink_dynamics(mass, masks, threshold)
    ever = transient = 0
    variance = moves = 0.0
    for sample in range(samples):
        path = [max(range(tokens), key=lambda k, s=s, n=sample: mass[n, s, k].item()) for s in range(steps)]
        assert found.dominant_positions[sample] == tuple(path)
        mean = sum(path) / steps
        variance += sum((position - mean) ** 2 for position in path) / steps / tokens**2 / samples
        moves += sum(a != b for a, b in itertools.pairwise(path))
        for k in range(tokens):
            column = masks[sample, :, k].double().tolist()
            if max(column) > 0.5:
                ever += 1
                transient += sum(column) / steps < threshold
    assert found.sinks_ever == pytest.approx(ever / samples)
    assert found.transient_share == pytest.approx(transient / max(ever, 1))
    assert found.dominant_variance == pytest.approx(variance)
    assert found.dominant_moves == pytest.approx(moves / max(samples * (steps - 1), 1))
    for step in range(steps):
        assert found.sinks_per_timestep[step] == pytest.approx((masks[:, step] > 0.5).sum().item() / samples)


def test_a_jumping_sink_has_the_variance_of_the_uniform_distribution():
    positions = torch.randint(0, 1000, (50, 200), generator=torch.Generator().manual_seed(0))
    mass = torch.nn.functional.one_hot(positions, 1000).float()
    found = sink_dynamics(mass, mass)
    # Standard error of the variance of 10,000 uniform draws is about 0.0008.
    assert found.dominant_variance == pytest.approx(1 / 12, abs=0.003)
    assert found.transient_share == 1


def test_positions_that_do_not_exist_yet_are_no_evidence():
    # Context grows from 2 to 4; position 3 is a sink as soon as it exists.
    present = torch.arange(4) < torch.tensor([[2], [3], [4]])
    masks = torch.zeros(1, 3, 4)
    masks[0, :, 0], masks[0, 2, 3] = 1, 1
    mass = masks + 0.1 * present
    assert sink_dynamics(mass, masks, present=present).transient_share == 0
    assert sink_dynamics(mass, masks).transient_share == 0.5


def test_no_sinks_at_all():
    found = sink_dynamics(torch.ones(2, 3, 8), torch.zeros(2, 3, 8))
    assert (found.sinks_ever, found.transient_share, found.persistence) == (0, 0, 0)


@pytest.mark.parametrize(
    ("mass", "masks", "threshold", "message"),
    [
        (torch.ones(3, 8), torch.ones(3, 8), 0.5, "samples, timesteps, tokens"),
        (torch.ones(1, 3, 8), torch.ones(1, 3, 7), 0.5, "samples, timesteps, tokens"),
        (torch.ones(0, 3, 8), torch.ones(0, 3, 8), 0.5, "at least one of each"),
        (torch.ones(1, 3, 8), torch.ones(1, 3, 8), 1.5, "sink_persistence is 1.5"),
    ],
)
def test_wrong_input_is_named(mass, masks, threshold, message):
    with pytest.raises(UsageError, match=message):
        sink_dynamics(mass, masks, threshold)
