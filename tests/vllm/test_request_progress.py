"""Where a request stands, against the steps that a worker's plan makes of the same request."""

import pytest

from sinkprune_plugin.diffusion import DiffusionFamily, DiffusionSpec
from sinkprune_plugin.sampling.options import SamplingOptions
from sinkprune_plugin.vllm.request_progress import RequestProgress

BLOCK_CAUSAL = DiffusionSpec(DiffusionFamily("toy", ("toy",), context="block_causal", block_key="length"), 2, 88, 8)


def story(progress, computed=0, budget=1000):
    """(computed, tokens, canvas, block, emitted) of each step to the end, as predicted."""
    steps = []
    while (query := progress.query(computed, budget)).tokens:
        assert query == progress.query(computed, query.tokens)
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


def on_grid(prompt, gen_length, steps):
    options = SamplingOptions.resolve(cache="commit", gen_length=gen_length, block_length=8, steps=steps)
    return RequestProgress(options.after_prompt(prompt, BLOCK_CAUSAL), prompt)


def test_a_block_causal_prompt_is_read_with_the_first_step():
    """Its last 5 tokens are in the first block, of which 3 are generated."""
    assert story(on_grid(21, 16, 4)) == [
        (0, 24, 3, 3, 0),
        (16, 8, 3, 3, 3),
        (24, 8, 8, 8, 0), (24, 8, 8, 8, 0), (24, 8, 8, 8, 8),
        (32, 5, 5, 5, 0), (32, 5, 5, 5, 5),
    ]  # fmt: skip


def test_a_prompt_within_the_first_block_is_not_run_by_itself():
    assert story(on_grid(3, 9, 2)) == [(0, 8, 5, 5, 0), (0, 8, 5, 5, 5), (8, 4, 4, 4, 4)]


@pytest.mark.parametrize("budget", [8, 15, 16, 20, 30, 47])
def test_a_block_causal_prompt_is_split_between_blocks(budget):
    steps = story(on_grid(45, 8, 2), budget=budget)
    prompt = [step for step in steps if not step[2]]
    assert all(computed % 8 == tokens % 8 == 0 for computed, tokens, *_ in prompt)
    assert all(tokens <= budget for _, tokens, *_ in steps)
    ran = sum(tokens for _, tokens, *_ in prompt)
    # The block of 5 tokens of the prompt and 3 others comes with what is left of the prompt, or by itself.
    assert steps[len(prompt)] == (ran, 48 - ran, 3, 3, 0)
    assert len(prompt) == -(-(48 - budget) // (budget // 8 * 8))


def test_a_budget_of_less_than_a_block_runs_nothing():
    assert on_grid(20, 8, 8).query(0, 7) == (0, 0, 0)
    assert on_grid(20, 8, 8).query(8, 12) == (8, 0, 0)


def test_a_block_causal_context_is_read_at_once_after_a_preemption():
    progress = on_grid(21, 16, 4)
    progress.restart(11)
    assert story(progress) == [(0, 37, 5, 5, 0), (32, 5, 5, 5, 5)]
    progress.restart(11)
    assert story(progress, budget=30) == [(0, 24, 0, 0, 0), (24, 13, 5, 5, 0), (32, 5, 5, 5, 5)]


@pytest.mark.parametrize(
    ("options", "fixed"), [({}, True), ({"threshold": 0.5}, False), ({"temperature": 1.0, "top_p": 0.5}, True)]
)
def test_whose_steps_are_known_in_advance(options, fixed):
    assert progress_of("none", gen_length=8, **options).fixed is fixed


def test_nothing_is_left_to_run_at_the_end():
    progress = progress_of("dual", gen_length=8, block_length=4)
    progress.restart(8)
    assert progress.query(0, 1000) == (0, 0, 0)
