"""The arithmetic of a step, against the expected steps of single requests."""

from dataclasses import replace

import numpy as np
import pytest

from sinkprune_plugin.sampling.batch_table import Column
from sinkprune_plugin.sampling.options import SamplingOptions
from sinkprune_plugin.vllm.step_plan import BatchLayout, SlotTable

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
    assert plan.table[0, Column.WIDTH] == len(plan.row_request) == 0
    computed = prompt - int(plan.table[0, Column.REJECTED])
    emitted, masked, committing, story = 0, None, False, []
    while emitted < gen_length:
        remaining = gen_length - emitted
        whole = cache in ("none", "prefix") or (cache == "dual" and computed == 0)
        canvas = remaining if whole else min(block_length, remaining)
        query = prompt + emitted + canvas - computed
        plan = table.plan(layout((2, computed, query, canvas)))
        request = dict(zip(Column, plan.table[0].tolist(), strict=True))
        width = min(block_length, remaining)
        assert (request[Column.SLOT], request[Column.WIDTH], request[Column.START]) == (2, width, prompt + emitted)
        # Logits for what is masked and nothing else; the host knows where the number of steps is fixed.
        expected = 0 if committing else (width if masked is None else masked)
        assert plan.row_request.tolist() == [0] * expected
        assert request[Column.ROWS] == expected
        assert int(plan.hidden_suffix[0]) == (0 if cache != "dual" else prompt + gen_length - computed - query)
        masked = width if masked is None else masked
        unmasked = 0 if committing else min(request[Column.COUNT], masked)
        if not committing:
            assert emitted <= request[Column.NOISE_STEP] < emitted + width
        story.append((computed, query, canvas, unmasked))
        masked -= unmasked
        waits = masked == 0 and cache == "commit" and not committing and not request[Column.IS_LAST]
        if masked == 0 and not waits:
            computed += query - request[Column.REJECTED_FINISHED]
            emitted, masked, committing = emitted + width, None, False
        else:
            computed += query - request[Column.REJECTED]
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
    assert plan.table[:, Column.WIDTH].tolist() == [4, 4, 0, 4]
    assert plan.table[2, Column.REJECTED] == 4
    # Canvas rows lie one request after the other: 4, 8, none and 8 of them.
    assert plan.table[:, Column.FIRST_HIDDEN].tolist() == [0, 4, 12, 12]
    assert plan.row_request.tolist() == [0] * 4 + [1] * 4 + [3] * 4
    assert plan.table[:, Column.FIRST_ROW].tolist() == [0, 4, 8, 8]
    assert plan.table[:, Column.SLOT].tolist() == [3, 1, 0, 2]
    assert plan.table[:, Column.SEED].tolist() == [3, 1, 0, 2]
    assert plan.hidden_suffix.tolist() == [0, 0, 0, 0]
    plan = table.plan(layout((2, 4, 4, 4)))
    assert plan.hidden_suffix.tolist() == [4]
    assert plan.table[0, Column.NOISE_STEP] == 1
    # Two of its four are unmasked by now.
    assert plan.table[0, Column.ROWS] == 2


def test_a_slot_that_is_given_away_begins_anew():
    table = SlotTable(SLOTS, CANVAS)
    options = SamplingOptions.resolve(gen_length=8, block_length=8)
    table.add(0, 4, options)
    first = table.plan(layout((0, 0, 12, 8)))
    second = table.plan(layout((0, 0, 12, 8)))
    assert (first.table[0, Column.NOISE_STEP], second.table[0, Column.NOISE_STEP]) == (0, 1)
    table.add(0, 4, options)
    assert table.plan(layout((0, 0, 12, 8))).table[0, Column.NOISE_STEP] == 0


def test_warm_up_requests_run_past_their_generation():
    """vLLM makes its own schedules for these; the plan must stay within the canvas."""
    table = SlotTable(SLOTS, CANVAS)
    table.add(1, CANVAS + 1, SamplingOptions.resolve(gen_length=CANVAS, block_length=32))
    for computed in (CANVAS + 1, 2 * CANVAS + 1, 3 * CANVAS + 1):
        plan = table.plan(layout((1, computed, CANVAS, CANVAS)))
        assert plan.needs.widest <= CANVAS
        assert plan.table[0, Column.ROWS] <= CANVAS


@pytest.mark.parametrize("rule", [{"threshold": 0.9}, {"factor": 1.0}])
def test_rows_of_a_request_whose_model_decides(rule):
    """At most as many as can be masked still, and exactly as many once the device has told."""
    table = SlotTable(SLOTS, CANVAS)
    table.add(1, 4, SamplingOptions.resolve(gen_length=16, block_length=8, **rule))
    table.add(2, 4, SamplingOptions.resolve(gen_length=16, block_length=8, steps=4))
    step = layout((1, 0, 20, 16), (2, 0, 20, 16))
    assert table.plan(step).table[:, Column.ROWS].tolist() == [8, 8]
    assert table.plan(step).table[:, Column.ROWS].tolist() == [7, 4]
    table.note_left(np.array([9, 3, 9, 9]))
    assert table.plan(step).table[:, Column.ROWS].tolist() == [3, 0]
    # The next block.
    assert table.plan(layout((1, 0, 20, 8))).table[:, Column.ROWS].tolist() == [8]


def test_what_the_sampler_needs():
    table = SlotTable(SLOTS, CANVAS)
    table.add(0, 4, SamplingOptions.resolve(gen_length=4, top_k=5))
    table.add(1, 4, SamplingOptions.resolve(gen_length=4, temperature=1.0, remasking="margin"))
    table.add(2, 4, SamplingOptions.resolve(gen_length=4, temperature=1.0, top_p=0.9, early_stop=True))
    needs = table.plan(layout((0, 0, 8, 4))).needs
    # Without a temperature a filter leaves the most likely token as it is.
    assert (needs.proposals.noise, needs.proposals.filters, needs.stops) == (False, False, False)
    needs = table.plan(layout((1, 0, 8, 4), (0, 0, 8, 4))).needs
    assert (needs.proposals.noise, needs.proposals.filters) == (True, False)
    assert needs.proposals.remaskings == {0, 2}
    needs = table.plan(layout((1, 4, 4, 4), (2, 0, 8, 4), (0, 0, 4, 0))).needs
    assert needs.filtered.tolist() == [3, 4, 5, 6]
    assert needs.stops
    assert needs.widest == 4


def test_a_block_on_the_grid_begins_within_the_prompt():
    """21 tokens, of which 5 are in the first block of 8; the rest of the prompt is read before or with it."""
    table = SlotTable(SLOTS, CANVAS)
    options = SamplingOptions.resolve(gen_length=16, block_length=8, steps=4, cache="commit")
    options = replace(options, on_grid=True, offset=5)
    table.add(1, 21, options)
    chunk = table.plan(layout((1, 0, 8, 0)))
    assert (chunk.table[0, Column.WIDTH], chunk.table[0, Column.REJECTED], chunk.cuts) == (0, 0, None)
    first = table.plan(layout((1, 8, 16, 3)))
    assert first.cuts.ends.tolist() == [16, 24]
    widths = Column.WIDTH, Column.START, Column.COUNT, Column.NOISE_STEP, Column.IS_LAST
    assert first.table[0, widths].tolist() == [3, 21, 3, 0, 0]
    # What was read of the prompt stays, the block is computed again.
    assert first.table[0, Column.REJECTED] == 8
    assert first.table[0, Column.REJECTED_FINISHED] == 0
    again = table.plan(layout((1, 16, 8, 3)))
    assert (again.table[0, Column.ROWS], again.cuts) == (0, None)
    second = table.plan(layout((1, 24, 8, 8)))
    assert second.table[0, widths].tolist() == [8, 24, 4, 3, 0]
    assert second.table[0, Column.REJECTED] == 8
    last = table.plan(layout((1, 32, 5, 5)))
    assert last.table[0, widths].tolist() == [5, 32, 3, 11, 1]
