"""The defaults that keep vLLM's allocations small, at the sizes where they change."""

import pytest

from sinkprune_plugin.vllm.memory_defaults import (
    BITMASK_BUDGET,
    MOST_REQUESTS,
    bitmask_bytes,
    default_canvas,
    default_requests,
    warms_up,
)

LLADA, DREAM, TINY = 126464, 152064, 4096


def test_bytes_of_the_bitmask():
    # The figure that made this necessary: 15.4 GiB.
    assert bitmask_bytes(1024, 1024, LLADA) == 1024 * 1024 * 3952 * 4
    assert bitmask_bytes(1, 1, 33) == 8


@pytest.mark.parametrize(
    ("context", "canvas"),
    [(131072, 1023), (4096, 1023), (4095, 1022), (2048, 511), (1024, 255), (1023, 255), (256, 255), (255, 254), (2, 1)],
)
def test_the_canvas_follows_the_context(context, canvas):
    assert default_canvas(context) == canvas
    assert warms_up(canvas, context) is (context >= 1024)


@pytest.mark.parametrize(("canvas", "vocabulary"), [(1023, LLADA), (1023, DREAM), (255, DREAM), (255, TINY), (1, 1)])
def test_as_many_requests_as_the_budget_holds(canvas, vocabulary):
    requests = default_requests(canvas, vocabulary)
    assert bitmask_bytes(requests, canvas, vocabulary) <= BITMASK_BUDGET
    assert requests == MOST_REQUESTS or bitmask_bytes(requests + 8, canvas, vocabulary) > BITMASK_BUDGET
    assert requests % 8 == 0


def test_at_least_one_request():
    assert default_requests(2**20, 2**20) == 1
    assert default_requests(20_000, LLADA) == 1
    # Fewer than a multiple of eight are taken as they are.
    assert default_requests(6_000, LLADA) == 5
