"""Speed side by side, on a clock that the test sets: fixed times first, then a shared machine with its disturbances."""

import math
import random
from collections import Counter

import pytest
import torch

from sinkprune_plugin.verification import speed as speed_module
from sinkprune_plugin.verification.speed import WARM_UP, Workload, compare_speed
from sinkprune_plugin.verification.speed_verdict import LEAST_REPETITIONS

CELLS = [(1, "none"), (1, "dual"), (4, "none"), (4, "dual")]
# Seconds of a run of tiny-llada with `verify --quick` on one core.
SECONDS = dict(zip(CELLS, (0.09, 0.09, 0.21, 0.13), strict=True))


class Machine:
    """A clock, and how long work takes on it: jitter of single runs, a slow drift, and bursts of other people's load.

    :param jitter: standard deviation of a run's log time
    :param drift: by how much speed rises and falls over 40 seconds
    :param busy: share of the time in which someone else takes part of the machine, which makes it 1.3 to 3 times slower
    :param burst: mean seconds of such a burst
    :param second_is_slower: by how much a run is slower that follows one of the other model
    """

    def __init__(self, seed, jitter=0.03, drift=0.15, busy=0.15, burst=2.0, second_is_slower=0.0):
        self.now, self.random = 0.0, random.Random(seed)
        self.jitter, self.drift, self.busy, self.burst = jitter, drift, busy, burst
        self.second_is_slower = second_is_slower
        self.changes, self.slowdown = 0.0, 1.0
        self.phase = self.random.uniform(0, 2 * math.pi)
        self.calls = []

    def run(self, seconds):
        left = seconds * math.exp(self.random.gauss(0, self.jitter))
        while left > 1e-9:
            if self.now >= self.changes:
                quiet = self.slowdown > 1 or not self.busy
                mean = math.inf if not self.busy else self.burst * (1 - self.busy) / self.busy if quiet else self.burst
                self.slowdown = 1.0 if quiet else self.random.uniform(1.3, 3)
                self.changes = self.now + (self.random.expovariate(1 / mean) if self.busy else math.inf)
            slower = self.slowdown * (1 + self.drift * math.sin(self.now / 40 * 2 * math.pi + self.phase))
            taken = min(left * slower, self.changes - self.now + 1e-9)
            self.now += taken
            left -= taken / slower


class SimulatedSampler:
    """A model that is ``ratio`` times as fast as the dense one on a simulated machine."""

    def __init__(self, machine, name, ratio=1.0, share=0.5):
        self.machine, self.name, self.ratio, self.share = machine, name, ratio, share
        self.forward_seconds = 0.0

    def __call__(self, prompts, workload, cache):
        cell = (len(prompts), cache)
        follows = len(self.machine.calls) % 2 == 1
        self.machine.calls.append((self.name, *cell))
        before = self.machine.now
        self.machine.run(SECONDS[cell] / self.ratio * (1 + self.machine.second_is_slower * follows))
        self.forward_seconds += self.share * (self.machine.now - before)


def workload(seed=0, **options):
    sizes = {"gen_length": 8, "steps": 4, "batch_sizes": (1, 4), "caches": ("none", "dual"), "seconds": 1.0}
    return Workload(torch.zeros(4, 3, dtype=torch.long), seed=seed, **sizes | options)


def simulate(monkeypatch, machine, ratio=1.0, **options):
    monkeypatch.setattr(speed_module.time, "perf_counter", lambda: machine.now)
    samplers = [SimulatedSampler(machine, "dense"), SimulatedSampler(machine, "pruned", ratio, share=0.25)]
    return compare_speed(*samplers, workload(**options))


def test_rows_and_whole_of_constant_times(monkeypatch):
    machine = Machine(0, jitter=0, drift=0, busy=0)
    compared = simulate(monkeypatch, machine, ratio=2.0)
    assert (compared.verdict, compared.repetitions, compared.confidence) == ("faster", LEAST_REPETITIONS, 0.99)
    for end in (compared.ratio, compared.ratio_low, compared.ratio_high):
        assert end == pytest.approx(2)
    assert [(row.batch, row.cache) for row in compared.rows] == CELLS
    row = compared.rows[2]
    assert row.dense_tokens_per_s == pytest.approx(4 * 8 / 0.21)
    assert row.pruned_tokens_per_s == pytest.approx(4 * 8 / 0.105)
    assert (row.ratio, row.ratio_low, row.ratio_high) == pytest.approx((2, 2, 2))
    assert (row.dense_ms_per_step, row.pruned_ms_per_step) == pytest.approx((52.5, 26.25))
    assert row.forward_share == pytest.approx(0.25)


def test_pairs_take_turns_in_random_order_and_no_cell_is_special(monkeypatch):
    machine = Machine(0, jitter=0, drift=0, busy=0)
    simulate(monkeypatch, machine, seconds=30)
    pairs = list(zip(machine.calls[::2], machine.calls[1::2], strict=True))
    assert all(first[1:] == second[1:] and first[0] != second[0] for first, second in pairs)
    repetitions = [pairs[start : start + 4] for start in range(0, len(pairs), 4)]
    assert all(sorted(first[1:] for first, _ in cells) == sorted(CELLS) for cells in repetitions)
    timed = repetitions[WARM_UP:]
    # 30 s are 28 repetitions of 2 * 0.52 s.
    assert len(timed) == 28
    # In each repetition both models are first twice; over all of them each is first in each cell.
    assert all(Counter(first[0] for first, _ in cells) == {"dense": 2, "pruned": 2} for cells in timed)
    assert len({first for cells in timed for first, _ in cells}) == 8
    # Each cell is the first of some repetition.
    assert {cells[0][0][1:] for cells in timed} == set(CELLS)


def test_the_number_of_repetitions_is_settled_by_the_warm_up(monkeypatch):
    for seconds, expected in ((0.1, 15), (20.0, 19), (1000.0, 40)):
        machine = Machine(0, jitter=0, drift=0, busy=0)
        assert simulate(monkeypatch, machine, seconds=seconds).repetitions == expected


def test_a_single_cell_gets_both_orders(monkeypatch):
    machine = Machine(0, jitter=0.01, busy=0, second_is_slower=0.1)
    compared = simulate(monkeypatch, machine, batch_sizes=(1,), caches=("none",), seconds=8)
    assert compared.verdict == "no measurable difference"
    assert set(machine.calls[2 * WARM_UP :: 2]) == {("dense", 1, "none"), ("pruned", 1, "none")}


NOISE = {
    "shared": {},
    "often busy": {"busy": 0.3, "burst": 1.0},
    "short bursts and jitter": {"busy": 0.4, "burst": 0.3, "jitter": 0.08},
    "the second run is slower": {"second_is_slower": 0.1},
    "thermal drift": {"drift": 0.4, "busy": 0.0},
}


@pytest.mark.parametrize("noise", NOISE.values(), ids=list(NOISE))
def test_a_model_against_itself_is_no_faster_and_no_slower(monkeypatch, noise):
    """At most one of a hundred, which is what the 99 % interval promises before the smallest difference is applied."""
    verdicts = Counter(
        simulate(monkeypatch, Machine(seed, **noise), seed=seed).verdict for seed in range(400)
    )  # fmt: skip
    assert verdicts["no measurable difference"] >= 396, verdicts


@pytest.mark.parametrize(
    ("noise", "found"),
    [("shared", 0.98), ("often busy", 0.98), ("short bursts and jitter", 0.9), ("thermal drift", 1.0)],
)
@pytest.mark.parametrize(("ratio", "verdict"), [(1.25, "faster"), (0.8, "slower")])
def test_a_real_difference_is_found(monkeypatch, noise, found, ratio, verdict):
    compared = [simulate(monkeypatch, Machine(seed, **NOISE[noise]), ratio, seed=seed) for seed in range(200)]
    assert sum(each.verdict == verdict for each in compared) >= found * 200
    # The interval holds the truth in 99 of 100. Six misses or more of 200 have a chance of 1.6 %.
    assert sum(each.ratio_low <= ratio <= each.ratio_high for each in compared) >= 195
