"""Speed side by side, on a clock that the test sets."""

import torch

from sinkprune_plugin.verification.speed import Workload, compare_speed


class FakeClock:
    """A sampler with a given duration; only the clock isn't real."""

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
