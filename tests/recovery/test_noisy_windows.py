"""The draws of a recovery: reproducible, evenly spread over noise levels, held-out text apart."""

import pytest
import torch

from sinkprune_plugin.diffusion import families
from sinkprune_plugin.diffusion.families import DiffusionSpec
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.recovery.noisy_windows import MOST_HELD_OUT, NoisyWindows, split_windows

FAMILIES = {family.name: family for family in families()}
SPEC = DiffusionSpec(FAMILIES["llada"], 2, 500)
WINDOWS = torch.randint(3, 500, (10, 16), generator=torch.Generator().manual_seed(1))


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


def test_a_draw_depends_on_seed_and_number_alone():
    draws = NoisyWindows(WINDOWS, SPEC, draws=30, strata=4, seed=5)
    again = NoisyWindows(WINDOWS, SPEC, draws=30, strata=4, seed=5)
    backwards = [again[index] for index in reversed(range(30))][::-1]
    assert all(same(draws[index], backwards[index]) for index in range(30))
    other = NoisyWindows(WINDOWS, SPEC, draws=30, strata=4, seed=6)
    assert not all(same(draws[index], other[index]) for index in range(30))


def test_each_window_comes_once_before_any_comes_again():
    draws = NoisyWindows(WINDOWS, SPEC, draws=30, strata=4, seed=5)
    order = [next(n for n, w in enumerate(WINDOWS) if torch.equal(w, draws[i]["clean"])) for i in range(30)]
    for start in (0, 10, 20):
        assert sorted(order[start : start + 10]) == list(range(10))
    assert order[:10] != order[10:20]


def test_a_step_covers_all_noise_levels():
    draws = NoisyWindows(WINDOWS, SPEC, draws=8, strata=4, seed=0)
    for start in (0, 4):
        levels = sorted(draws[start + i]["p_mask"].item() for i in range(4))
        # p = 0.999 t + 0.001, one t in each quarter.
        assert [int(min((p - 0.001) / 0.999, 0.999999) * 4) for p in levels] == [0, 1, 2, 3]


def test_corruption_is_that_of_the_family():
    dream = DiffusionSpec(FAMILIES["dream"], 2, 500)
    draws = NoisyWindows(WINDOWS, dream, draws=40, strata=4, seed=0)
    batch = [draws[i] for i in range(40)]
    assert not any(draw["corrupted"][0] or draw["corrupted"][-1] for draw in batch)
    for draw in batch:
        assert torch.equal(draw["input_ids"] == 2, draw["corrupted"])
        assert torch.equal(draw["input_ids"][~draw["corrupted"]], draw["clean"][~draw["corrupted"]])


def test_held_out_windows_are_apart_and_few():
    training, held_out = split_windows(WINDOWS, SPEC, held_out=0.2, steps=3, batch_size=4, seed=0)
    assert (len(training), len(training.windows), len(held_out.windows), len(held_out)) == (12, 8, 2, 8)
    both = torch.cat([training.windows, held_out.windows])
    assert sorted(both.tolist()) == sorted(WINDOWS.tolist())
    many = torch.arange(1000 * 8).reshape(1000, 8)
    assert len(split_windows(many, SPEC, held_out=0.5, steps=1, batch_size=1, seed=0)[1].windows) == MOST_HELD_OUT


def test_too_little_text():
    with pytest.raises(UsageError, match="the text gives 1 windows and 1 are held out, which leaves none"):
        split_windows(WINDOWS[:1], SPEC, held_out=0.05, steps=1, batch_size=1, seed=0)
