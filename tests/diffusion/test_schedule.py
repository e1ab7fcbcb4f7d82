import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkprune_plugin.diffusion import timestep_grid, timestep_weight
from sinkprune_plugin.errors import UsageError


def test_published_grid():
    assert timestep_grid(50, 5) == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def test_grid_that_does_not_reach_the_end():
    assert timestep_grid(10, 4) == (0.4, 0.8)


@given(steps=st.integers(1, 2000), interval=st.integers(1, 2000))
@settings(deadline=None, max_examples=200)
def test_grid_is_every_kth_step(steps, interval):
    if interval > steps:
        with pytest.raises(UsageError, match=f"sample_interval {interval} exceeds diffusion_steps {steps}"):
            timestep_grid(steps, interval)
        return
    grid = timestep_grid(steps, interval)
    # Division of two small integers rounds to the nearest double, so multiplying back and rounding is exact.
    assert [round(t * steps) for t in grid] == list(range(interval, steps + 1, interval))
    assert grid[0] > 0
    assert grid[-1] <= 1


@pytest.mark.parametrize(("steps", "interval"), [(0, 1), (-5, 1), (10, 0), (10, -1)])
def test_numbers_that_are_not_positive(steps, interval):
    with pytest.raises(UsageError, match="at least 1"):
        timestep_grid(steps, interval)


@pytest.mark.parametrize("t", [0.02, 0.1, 0.5, 1.0])
def test_timestep_weights_are_inverse_powers(t):
    assert timestep_weight(t, "uniform") == 1.0
    # One rounding of pow: a few units in the last place of a double.
    assert math.isclose(timestep_weight(t, "inverse"), 1 / t, rel_tol=1e-14)
    assert math.isclose(timestep_weight(t, "inverse_square"), 1 / t**2, rel_tol=1e-14)


def test_timestep_weight_errors():
    with pytest.raises(UsageError, match="'linear'; it must be one of uniform, inverse, inverse_square"):
        timestep_weight(0.5, "linear")
    for t in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(UsageError, match=r"must be in \(0, 1\]"):
            timestep_weight(t, "inverse")
