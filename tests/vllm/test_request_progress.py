"""Where a request stands, against the steps that a worker's plan makes of the same request."""

import pytest

from sinkprune_plugin.sampling.options import SamplingOptions
from sinkprune_plugin.vllm.request_progress import RequestProgress


def story(progress, computed=0):
    """(computed, tokens, canvas, block, emitted) of each step to the end, as predicted."""
    steps = []
    while (query := progress.query(computed)).tokens:
        emitted = progress.predict(query)
        steps.append((computed, *query, emitted))
        computed = progress.settle(query, computed, emitted)
    return steps


def progress_of(cache, prompt=5, **options):
    return RequestProgress(SamplingOptions.resolve(cache=cache, **options), prompt)


def test_none():
    assert story(progress_of("none", gen_length=16, block_length=8, steps=4)) == [
        (0, 21, 16, 8, 0), (0, 21, 16, 8, 8), (0, 21, 8, 8, 0), (0, 21, 8, 8, 8)
    ]  # fmt: skip


def test_prefix():
    assert story(progress_of("prefix", gen_length=16, block_length=8, steps=4)) == [
        (0, 21, 16, 8, 0), (5, 16, 16, 8, 8), (0, 21, 8, 8, 0), (13, 8, 8, 8, 8)
    ]  # fmt: skip


def test_dual():
    assert story(progress_of("dual", gen_length=16, block_length=8, steps=4)) == [
        (0, 21, 16, 8, 0), (5, 8, 8, 8, 8), (0, 21, 8, 8, 0), (13, 8, 8, 8, 8)
    ]  # fmt: skip


def test_commit_runs_its_prompt_first_and_a_finished_block_once_more():
    assert story(progress_of("commit", gen_length=20, block_length=8, steps=5)) == [
        (0, 5, 0, 0, 0),
        (5, 8, 8, 8, 0), (5, 8, 8, 8, 0), (5, 8, 8, 8, 8),
        (13, 8, 8, 8, 0), (13, 8, 8, 8, 0), (13, 8, 8, 8, 8),
        (21, 4, 4, 4, 4),
    ]  # fmt: skip


def test_commit_replays_block_by_block_after_a_preemption():
    progress = progress_of("commit", gen_length=20, block_length=8, steps=3)
    progress.restart(16)
    assert story(progress) == [(0, 5, 0, 0, 0), (5, 8, 0, 0, 0), (13, 8, 0, 0, 0), (21, 4, 4, 4, 4)]


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "commit"])
@pytest.mark.parametrize(("gen_length", "block_length", "steps"), [(20, 8, 9), (7, 8, 7), (64, 16, 64), (1, 1, 1)])
def test_a_preemption_costs_the_open_block_and_changes_nothing_else(cache, gen_length, block_length, steps):
    shape = {"gen_length": gen_length, "block_length": min(block_length, gen_length), "steps": steps}
    whole = story(progress_of(cache, **shape))
    assert sum(emitted for *_, emitted in whole) == gen_length
    for stop in range(len(whole)):
        done = sum(emitted for *_, emitted in whole[:stop])
        progress = progress_of(cache, **shape)
        progress.restart(done)
        resumed = story(progress)
        if cache == "commit":
            # What was kept is computed again, in queries that see no more than they did at first.
            replay = [step for step in resumed if not step[2]]
            assert [step[0] for step in replay] == [0, *range(5, 5 + done, shape["block_length"])]
            resumed = resumed[len(replay) :]
        assert resumed == whole[-len(resumed) :]


@pytest.mark.parametrize(
    ("options", "fixed"), [({}, True), ({"threshold": 0.5}, False), ({"temperature": 1.0, "top_p": 0.5}, True)]
)
def test_whose_steps_are_known_in_advance(options, fixed):
    assert progress_of("none", gen_length=8, **options).fixed is fixed


def test_nothing_is_left_to_run_at_the_end():
    progress = progress_of("dual", gen_length=8, block_length=4)
    progress.restart(8)
    assert progress.query(0) == (0, 0, 0)
