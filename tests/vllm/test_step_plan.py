"""The arithmetic of a step, against the expected steps of single requests."""

import numpy as np
import pytest

from sinkprune_plugin.sampling.options import SamplingOptions
from sinkprune_plugin.vllm.step_plan import BatchLayout, RequestNumbers, SlotTable

SLOTS = 4
CANVAS = 64


def layout(*requests):
    """Requests as (slot, computed, query, canvas)."""
    return BatchLayout(*(np.array(column, np.int64) for column in zip(*requests, strict=True)))


def tell(cache, prompt, gen_length, block_length, steps):
    """Run one request to its end on the table alone, as scheduler and worker would.

    :return: list of (computed, query, canvas, unmasked) of each step, and what was emitted in all
    """
    table = SlotTable(SLOTS, CANVAS)
    options = SamplingOptions.resolve(gen_length=gen_length, block_length=block_length, steps=steps, cache=cache)
    table.add(2, prompt, options)
    plan = table.plan(layout((2, 0, prompt, 0)))
    computed = prompt - int(plan.idle_rejected[0])
    assert len(plan.numbers.slot) == 0
    emitted, masked, committing, story = 0, None, False, []
    while emitted < gen_length:
        remaining = gen_length - emitted
        whole = cache in ("none", "prefix") or (cache == "dual" and computed == 0)
        canvas = remaining if whole else min(block_length, remaining)
        query = prompt + emitted + canvas - computed
        plan = table.plan(layout((2, computed, query, canvas)))
        (request,) = (RequestNumbers(*row) for row in np.stack(plan.numbers, axis=1).tolist())
        width = min(block_length, remaining)
        assert (request.slot, request.number, request.width, request.start) == (2, 0, width, prompt + emitted)
        assert plan.rows.tolist() == list(range(width))
        assert plan.row_column.tolist() == list(range(width))
        assert int(plan.hidden_suffix[0]) == (0 if cache != "dual" else prompt + gen_length - computed - query)
        masked = width if masked is None else masked
        unmasked = 0 if committing else min(request.to_unmask, masked)
        if not committing:
            assert emitted <= request.noise_step < emitted + width
        story.append((computed, query, canvas, unmasked))
        masked -= unmasked
        waits = masked == 0 and cache == "commit" and not committing and not request.is_last
        if masked == 0 and not waits:
            computed += query - request.rejected_finished
            emitted, masked, committing = emitted + width, None, False
        else:
            computed += query - request.rejected
            committing = waits
    return story


def test_none_computes_everything_in_each_step():
    story = tell("none", prompt=5, gen_length=16, block_length=8, steps=8)
    assert story == [(0, 21, 16, 2)] * 4 + [(0, 21, 8, 2)] * 4


def test_prefix_keeps_what_lies_before_the_canvas():
    story = tell("prefix", prompt=5, gen_length=16, block_length=8, steps=4)
    assert story == [(0, 21, 16, 4), (5, 16, 16, 4), (0, 21, 8, 4), (13, 8, 8, 4)]


def test_dual_computes_the_block_only():
    story = tell("dual", prompt=5, gen_length=16, block_length=8, steps=6)
    assert story == [(0, 21, 16, 3), (5, 8, 8, 3), (5, 8, 8, 2), (0, 21, 8, 3), (13, 8, 8, 3), (13, 8, 8, 2)]


def test_commit_runs_a_finished_block_once_more_and_never_goes_back():
    story = tell("commit", prompt=5, gen_length=16, block_length=8, steps=4)
    assert story == [(5, 8, 8, 4), (5, 8, 8, 4), (5, 8, 8, 0), (13, 8, 8, 4), (13, 8, 8, 4)]


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "commit"])
@pytest.mark.parametrize(("gen_length", "block_length", "steps"), [(20, 8, 9), (7, 8, 7), (64, 16, 64), (1, 1, 1)])
def test_each_block_is_unmasked_in_its_steps(cache, gen_length, block_length, steps):
    block_length = min(block_length, gen_length)
    options = SamplingOptions.resolve(gen_length=gen_length, block_length=block_length, steps=steps)
    story = tell(cache, 3, gen_length, block_length, steps)
    expected = [count for block in range(len(options.blocks)) for count in options.tokens_per_step(block)]
    assert [unmasked for *_, unmasked in story if unmasked] == expected
    assert sum(expected) == gen_length


def test_requests_of_all_kinds_side_by_side():
    table = SlotTable(SLOTS, CANVAS)
    for slot, cache in enumerate(("none", "prefix", "dual", "commit")):
        table.add(slot, 4, SamplingOptions.resolve(gen_length=8, block_length=4, steps=4, cache=cache, seed=slot))
    plan = table.plan(layout((3, 4, 4, 4), (1, 0, 12, 8), (0, 0, 4, 0), (2, 0, 12, 8)))
    assert plan.idle.tolist() == [2]
    assert plan.idle_slots.tolist() == [0]
    assert plan.idle_rejected.tolist() == [4]
    # Canvas rows lie one request after the other: 4, 8 and 8 of them; the first 4 of each are the block.
    assert plan.rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15]
    assert plan.row_request.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert plan.numbers.number.tolist() == [0, 1, 3]
    assert plan.numbers.seed.tolist() == [3, 1, 2]
    assert plan.hidden_suffix.tolist() == [0, 0, 0, 0]
    plan = table.plan(layout((2, 4, 4, 4)))
    assert plan.hidden_suffix.tolist() == [4]
    assert plan.numbers.noise_step[0] == 1


def test_a_slot_that_is_given_away_begins_anew():
    table = SlotTable(SLOTS, CANVAS)
    options = SamplingOptions.resolve(gen_length=8, block_length=8)
    table.add(0, 4, options)
    first = table.plan(layout((0, 0, 12, 8)))
    second = table.plan(layout((0, 0, 12, 8)))
    assert (first.numbers.noise_step[0], second.numbers.noise_step[0]) == (0, 1)
    table.add(0, 4, options)
    assert table.plan(layout((0, 0, 12, 8))).numbers.noise_step[0] == 0


def test_warm_up_requests_run_past_their_generation():
    """vLLM makes its own schedules for these; the plan must stay within the canvas."""
    table = SlotTable(SLOTS, CANVAS)
    table.add(1, CANVAS + 1, SamplingOptions.resolve(gen_length=CANVAS, block_length=32))
    for computed in (CANVAS + 1, 2 * CANVAS + 1, 3 * CANVAS + 1):
        plan = table.plan(layout((1, computed, CANVAS, CANVAS)))
        assert plan.widest <= CANVAS
        assert plan.rows.max() < CANVAS
