"""A block-causal context as sequences of one block each: the same attention as with the mask of the whole."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sinkprune_plugin.models.block_attention import context_mask
from sinkprune_plugin.vllm.query_cuts import cut_queries


def cut(*requests):
    """Requests as (computed, query, block length)."""
    return cut_queries(*(np.array(column, np.int64) for column in zip(*requests, strict=True)))


def test_a_prompt_is_cut_where_blocks_begin():
    cuts = cut((0, 21, 8))
    assert cuts.request.tolist() == [0, 0, 0]
    assert cuts.starts.tolist() == [0, 8, 16, 21]
    assert cuts.ends.tolist() == [8, 16, 21]
    assert cuts.widest == 8


def test_requests_side_by_side():
    """A chunk of a prompt, a denoised block, a request whose blocks aren't on a grid, and another prompt."""
    cuts = cut((16, 16, 8), (40, 8, 8), (0, 30, 0), (4, 6, 4))
    assert cuts.request.tolist() == [0, 0, 1, 2, 3, 3]
    assert cuts.starts.tolist() == [0, 8, 16, 24, 54, 58, 60]
    assert cuts.ends.tolist() == [24, 32, 48, 30, 8, 10]
    assert cuts.widest == 30


@pytest.mark.parametrize("requests", [[(0, 8, 8)], [(8, 8, 8), (16, 3, 8)], [(0, 100, 0)], [(5, 3, 8), (9, 1, 0)]])
def test_nothing_is_cut_within_a_block(requests):
    assert cut(*requests) is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40), st.integers(0, 9)), min_size=1, max_size=5))
def test_every_position_sees_what_the_mask_says(requests):
    cuts = cut(*requests)
    if cuts is None:
        assert all(not length or computed // length == (computed + query - 1) // length
                   for computed, query, length in requests)  # fmt: skip
        return
    seen = np.repeat(cuts.ends, np.diff(cuts.starts)).tolist()
    owner = np.repeat(cuts.request, np.diff(cuts.starts)).tolist()
    expected, owners = [], []
    for number, (computed, query, length) in enumerate(requests):
        end = computed + query
        mask = context_mask(end, length, "block_causal") if length else torch.ones(end, end, dtype=torch.bool)
        expected += mask[computed:].sum(1).tolist()
        owners += [number] * query
    assert seen == expected
    assert owner == owners


def test_attention_of_the_parts_is_that_of_the_mask():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 21, 4, dtype=torch.float64)
    whole = F.scaled_dot_product_attention(q, k, v, context_mask(21, 8, "block_causal"))
    cuts = cut((0, 21, 8))
    parts = [
        F.scaled_dot_product_attention(q[:, start:end], k[:, :end], v[:, :end])
        for start, end in zip(cuts.starts, cuts.ends, strict=False)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
