"""Which passes a block is fitted on: all of them, in shares, the same ones on any number of processes."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from sinkprune_plugin.modifiers.fit_plan import plan_fit


def plan(windows, timesteps=3, **options):
    return plan_fit(windows, timesteps, **{"step_passes": 4, "epochs": 2, "held_out": 0.25, "seed": 0, **options})


def by_window(passes, windows, timesteps):
    """Passes as (window in the order of one process, timestep)."""
    numbered = [(rank, turn) for turn in range(max(windows)) for rank, count in enumerate(windows) if turn < count]
    return [(numbered.index((rank, number // timesteps)), number % timesteps) for rank, number in passes]


@given(
    windows=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    timesteps=st.integers(1, 4),
    step_passes=st.integers(1, 9),
    epochs=st.integers(1, 3),
    held_out=st.sampled_from([0.0, 0.125, 0.5, 0.9]),
)
def test_every_pass_is_trained_on_once_an_epoch_or_held_out(windows, timesteps, step_passes, epochs, held_out):
    found = plan(windows, timesteps, step_passes=step_passes, epochs=epochs, held_out=held_out)
    everything = {(rank, number) for rank, count in enumerate(windows) for number in range(count * timesteps)}
    trained = Counter(each for step in found.steps for each in step)
    kept = set(found.held_out)
    assert not kept & set(trained)
    # Of a window all timesteps or none.
    assert len(kept) % timesteps == 0
    assert bool(kept) == (held_out > 0 and sum(windows) > 1)
    assert max(trained.values()) <= epochs
    left_over = epochs * len(everything - kept) - sum(trained.values())
    assert 0 <= left_over < step_passes
    assert all(0 < len(step) <= step_passes for step in found.steps)


def test_the_plan_is_that_of_one_process():
    """Seven windows dealt out in turn to one, two and three processes."""
    alone = plan([7])
    for windows in ([4, 3], [3, 2, 2]):
        shared = plan(windows)
        assert [by_window(step, windows, 3) for step in shared.steps] == [by_window(s, [7], 3) for s in alone.steps]
        assert by_window(shared.held_out, windows, 3) == by_window(alone.held_out, [7], 3)


def test_processes_have_about_the_same_part_of_each_step():
    found = plan([16, 16], timesteps=10, step_passes=8)
    shares = Counter(sum(rank for rank, _ in step) for step in found.steps)
    # Three or five only where one round over the windows ends within a step.
    assert set(shares) <= {3, 4, 5}
    assert shares[4] > 0.7 * len(found.steps)


def test_the_seed_decides_the_order():
    assert plan([7]) == plan([7])
    assert plan([7]).steps != plan([7], seed=1).steps
