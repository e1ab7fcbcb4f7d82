import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.pruning.patterns import (
    MaskStructure,
    lowest_in_rows,
    parse_mask_structure,
    resolve_sparsity,
)


@pytest.mark.parametrize(("text", "n", "m"), [("0:0", 0, 0), ("2:4", 2, 4), ("1:8", 1, 8), (" 4:8 ", 4, 8)])
def test_mask_structures_are_read_as_n_of_m(text, n, m):
    assert parse_mask_structure(text) == MaskStructure(n, m)


@pytest.mark.parametrize("text", ["4:2", "2:0", "0:4", "4:4", "2-4", "", "2:4:8", "a:b", "-2:4"])
def test_refuses_structures_that_make_no_sense(text):
    with pytest.raises(UsageError, match="mask_structure"):
        parse_mask_structure(text)


@pytest.mark.parametrize("value", [0.0, 1.0, 1.7, -0.5, float("nan")])
def test_refuses_sparsity_outside_its_range(value):
    with pytest.raises(UsageError, match=r"outside \(0, 1\)"):
        resolve_sparsity(value, parse_mask_structure("0:0"))


def test_refuses_sparsity_that_contradicts_the_structure():
    with pytest.raises(UsageError, match=r"sparsity 0.3 contradicts mask_structure 2:4.*0\.5"):
        resolve_sparsity(0.3, parse_mask_structure("2:4"))
    with pytest.raises(UsageError, match="contradicts"):
        resolve_sparsity([0.5, 0.3], parse_mask_structure("2:4"))


def test_sparsity_may_be_left_out_for_n_of_m_only():
    assert resolve_sparsity(None, parse_mask_structure("1:4")) == 0.25
    with pytest.raises(UsageError, match="sparsity is missing"):
        resolve_sparsity(None, parse_mask_structure("0:0"))
    with pytest.raises(UsageError, match="empty list"):
        resolve_sparsity([], parse_mask_structure("0:0"))


@pytest.mark.parametrize(
    ("text", "fits"), [("2:4", True), ("3:4", True), ("1:2", True), ("1:4", False), ("4:8", False), ("0:0", False)]
)
def test_which_structures_fit_the_2_of_4_format(text, fits):
    assert parse_mask_structure(text).implies_2_of_4 == fits


def test_refuses_columns_that_are_no_multiple():
    with pytest.raises(UsageError, match=r"proj has 10 input columns.*groups of 4"):
        MaskStructure(2, 4).check_columns("proj", 10)
    MaskStructure(2, 4).check_columns("proj", 12)
    MaskStructure(0, 0).check_columns("proj", 7)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 6), st.integers(1, 5), st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8)]), st.integers(0, 99)
)
def test_groups_equal_a_loop_over_columns(rows, groups, nm, seed):
    n, m = nm
    # Few distinct values, so that ties are common.
    metric = torch.randint(0, 4, (rows, groups * m), generator=torch.Generator().manual_seed(seed)).float()
    mask = MaskStructure(n, m).lowest_in_groups(metric)
    for row in range(rows):
        for start in range(0, groups * m, m):
            order = sorted(range(m), key=lambda k: (metric[row, start + k].item(), k))
            expected = [k in order[:n] for k in range(m)]
            assert mask[row, start : start + m].tolist() == expected


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5), st.integers(1, 30), st.floats(0, 1), st.sampled_from([2, 1000]), st.integers(0, 99))
def test_lowest_in_rows_equals_a_stable_sort(rows, columns, share, values, seed):
    metric = torch.randint(0, values, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    count = int(share * columns)
    order = metric.argsort(dim=1, stable=True)[:, :count]
    expected = torch.zeros_like(metric, dtype=torch.bool).scatter_(1, order, True)
    assert torch.equal(lowest_in_rows(metric, count), expected)
