"""Structures of zeros: found, not found, and zeros counted in every dtype."""

import pytest
import torch
from checkpoint_maker import unstructured
from hypothesis import given, settings
from hypothesis import strategies as st
from structure_cases import dense, n_of_m

from sinkprune_plugin.inspection.structure import common_structure, count_zeros, structure_of

PATTERNS = [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (2, 8), (7, 8), (8, 16), (1, 3), (3, 5)]


def structure(*weights):
    return common_structure([count_zeros(weight) for weight in weights])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("more", [0.0, 0.04])
def test_n_of_m_is_found_in_spite_of_a_few_more_zeros(n, m, more):
    """As after pruning, and as after rounding to 8 bits, which makes some of the others zero."""
    assert structure_of(count_zeros(n_of_m(n, m, more=more))) == f"{n}:{m}"


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_one_group_that_breaks_the_pattern(n, m):
    weight = n_of_m(n, m)
    weight[-1, -m:] = 1
    assert structure_of(count_zeros(weight)) == "unstructured"


@pytest.mark.parametrize("share", [0.3, 0.5, 0.75, 0.9, 0.97, 0.999])
@pytest.mark.parametrize("quota", ["weight", "row"])
@pytest.mark.parametrize("shape", [(16, 64), (64, 240), (192, 512)])
def test_zeros_anywhere_are_no_pattern(share, quota, shape):
    scores = torch.rand(shape)
    threshold = scores.quantile(share, dim=1, keepdim=True) if quota == "row" else share
    assert structure_of(count_zeros(dense(*shape).masked_fill(scores < threshold, 0))) == "unstructured"


def test_dense_weights_have_some_zeros_too():
    assert structure_of(count_zeros(dense(64, 240))) == "dense"
    assert structure_of(count_zeros(unstructured(64, 240, zeros=0.03))) == "dense"
    assert structure_of(count_zeros(unstructured(64, 240, zeros=0.08))) == "unstructured"
    # What rounding to int8 leaves of an unpruned weight.
    assert structure_of(count_zeros(unstructured(64, 240, zeros=0.08, dtype=torch.int8))) == "dense"
    assert structure_of(count_zeros(torch.zeros(8, 16))) == "zero"
    assert structure_of(count_zeros(torch.zeros(0, 16))) == "dense"


def test_several_weights_have_the_tightest_common_structure():
    assert structure(n_of_m(2, 4), n_of_m(2, 4), torch.zeros(8, 16)) == "2:4"
    assert structure(n_of_m(2, 4), n_of_m(3, 4)) == "2:4"
    assert structure(n_of_m(1, 4), n_of_m(3, 4)) == "1:4"
    assert structure(n_of_m(2, 4), n_of_m(4, 8)) == "4:8"
    assert structure(n_of_m(1, 3), n_of_m(2, 4, columns=244)) == "mixed"
    assert structure(n_of_m(2, 4), dense(64, 240)) == "mixed"
    assert structure(n_of_m(2, 4), unstructured(64, 240)) == "mixed"
    assert structure(unstructured(64, 240), unstructured(64, 240)) == "unstructured"
    assert structure() == "dense"


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 40), st.integers(1, 6), st.sampled_from([2, 3, 4, 8, 16]), st.floats(0, 1), st.integers(0, 99))
def test_counts_equal_a_loop(rows, groups, width, share, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.rand(rows, groups * width, generator=generator) >= share).float()
    count = count_zeros(weight)
    assert (count.weights, count.zeros) == (weight.numel(), int((weight == 0).sum()))
    if width in count.groups:
        each = [(row[start : start + width] == 0).sum() for row in weight for start in range(0, len(row), width)]
        assert count.groups[width].tolist() == [sum(int(number) == n for number in each) for n in range(width + 1)]


@pytest.mark.parametrize(
    ("dtype", "zeros"),
    [
        (torch.float8_e4m3fn, 3),
        (torch.float8_e5m2, 3),
        (torch.float8_e4m3fnuz, 2),  # 0x80 is NaN there
        (torch.float8_e8m0fnu, 0),  # has powers of two alone
        (torch.int8, 2),  # 0x80 is −128
        (torch.uint8, 2),
    ],
)
def test_zeros_of_8_bit_dtypes(dtype, zeros):
    weight = torch.tensor([[0x00, 0x80, 0x01, 0x7F, 0x00, 0xFF]], dtype=torch.uint8).view(dtype)
    assert count_zeros(weight).zeros == zeros


def test_zeros_of_wide_dtypes():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert count_zeros(torch.tensor([[0.0, -0.0, torch.nan, 1.0]], dtype=dtype)).zeros == 2
    assert count_zeros(torch.tensor([[0, 1 << 40]])).zeros == 1
