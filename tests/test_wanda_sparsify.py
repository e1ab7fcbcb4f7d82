import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkprune_plugin.modifiers.mask_structure import MaskStructure
from sinkprune_plugin.modifiers.wanda.wanda_sparsify import observe_input, sparsify_weight, weighted_square_sums

UNSTRUCTURED = MaskStructure(0, 0)


def two_pass_norms(x, mask, valid):
    """The published formulation: the mask is known, rows are scaled, norms are taken. In float64 as the yardstick."""
    weights = (1.0 - mask.double()) * (1.0 if valid is None else valid.double())
    return (weights.unsqueeze(-1) * x.double()).norm(dim=1)


def make_case(seed, batch, tokens, columns, num_sinks, *, massive=False, padded=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, columns, generator=generator)
    mass = torch.rand(batch, tokens, generator=generator)
    valid = None
    if padded:
        lengths = torch.randint(1, tokens + 1, (batch, 1), generator=generator)
        valid = torch.arange(tokens) < lengths
    mask = torch.zeros(batch, tokens)
    if num_sinks:
        sinks = mass.topk(num_sinks, dim=1).indices
        # Mostly saturated, some soft: what the sigmoid gives.
        soft = torch.rand(batch, num_sinks, generator=generator).round(decimals=1)
        mask.scatter_(1, sinks, soft)
        if massive:
            x.scatter_(1, sinks.unsqueeze(-1).expand(-1, -1, columns), 1e4)
            mask.scatter_(1, sinks, 1.0)
    return x, mass, mask, valid


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 40),
    columns=st.integers(1, 12),
    share=st.floats(0, 1),
    slack=st.integers(0, 5),
    massive=st.booleans(),
    padded=st.booleans(),
)
def test_one_pass_equals_two_pass(seed, batch, tokens, columns, share, slack, massive, padded):
    num_sinks = int(share * tokens)
    x, mass, mask, valid = make_case(seed, batch, tokens, columns, num_sinks, massive=massive, padded=padded)
    weights = (1 - mask) if valid is None else (1 - mask) * valid
    statistics = observe_input(x, mass, valid, num_sinks + slack)
    assert statistics.covers(mask)
    expected = two_pass_norms(x, mask, valid)
    # Sums of at most 40 float32 squares: relative error below 40 × 2⁻²⁴ on the sum, half of that on its root.
    tolerance = {"rtol": 3e-6, "atol": 1e-6}
    torch.testing.assert_close(statistics.square_sums(weights).sqrt().double(), expected, **tolerance)
    kept = statistics.keep_only(mask, valid)
    torch.testing.assert_close(kept.square_sums(weights).sqrt().double(), expected, **tolerance)
    assert kept.rows.shape[1] <= statistics.rows.shape[1]


def test_a_sink_that_was_not_set_aside_is_noticed():
    x, mass, mask, _ = make_case(0, 2, 20, 4, 3)
    mask[1, mass[1].argmin()] = 0.7
    assert not observe_input(x, mass, None, 5).covers(mask)
    assert observe_input(x, mass, None, 20).covers(mask)


def test_an_input_that_the_model_wrote_into_is_not_trusted():
    x, mass, mask, _ = make_case(0, 1, 8, 4, 2)
    statistics = observe_input(x, mass, None, 8)
    assert statistics.covers(mask)
    x.add_(1.0)
    assert not statistics.covers(mask)


def test_a_negligible_mask_needs_no_row():
    x, mass, mask, _ = make_case(0, 1, 20, 4, 0)
    mask[0, mass[0].argmin()] = 1e-9
    statistics = observe_input(x, mass, None, 2)
    assert statistics.covers(mask)
    # The ignored mask weighs less than a float32 unit in the last place, 6e-8.
    torch.testing.assert_close(
        statistics.square_sums(1 - mask).sqrt().double(), two_pass_norms(x, mask, None), rtol=1e-6, atol=0
    )


def test_massive_sink_rows_leave_no_rounding_error_behind():
    """A massive row swallows the small ones in a sum, so subtracting it later would leave nothing of them."""
    x = torch.full((1, 100, 1), 1e-2)
    x[0, 7] = 1e4
    mask = torch.zeros(1, 100)
    mask[0, 7] = 1.0
    statistics = observe_input(x, mask, None, 1)
    # 99 × 1e-4 = 9.9e-3; a float32 unit of 1e8 is 8, so a subtraction could not be right by any tolerance.
    torch.testing.assert_close(statistics.square_sums(1 - mask), torch.tensor([[9.9e-3]]), rtol=1e-5, atol=0)


def test_bfloat16_inputs_are_summed_in_float32():
    x = torch.ones(1, 4096, 2, dtype=torch.bfloat16)
    # bfloat16 would stop counting at 256.
    assert weighted_square_sums(x, torch.ones(1, 4096)).tolist() == [[4096.0, 4096.0]]


def naive_sparsify(W, norms, count):
    result = W.clone()
    for row in range(W.shape[0]):
        scores = [(abs(float(W[row, j])) * float(norms[j]), j) for j in range(W.shape[1])]
        for _, j in sorted(scores)[:count]:
            result[row, j] = 0
    return result


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 1000),
    st.integers(1, 5),
    st.integers(1, 12),
    st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.75, 0.9]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_unstructured_equals_a_loop(seed, rows, columns, sparsity, dtype):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator).to(dtype)
    norms = torch.rand(columns, generator=generator)
    before = W.clone()
    count = math.floor(Fraction(str(sparsity)) * columns)
    pruned = sparsify_weight(W, norms, sparsity, UNSTRUCTURED)
    torch.testing.assert_close(pruned, naive_sparsify(W, norms, count), rtol=0, atol=0)
    assert pruned.dtype == dtype
    torch.testing.assert_close(W, before, rtol=0, atol=0)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_n_of_m_holds_in_every_group(n, m):
    W = torch.randn(16, 32)
    pruned = sparsify_weight(W, torch.rand(32), 0.123, MaskStructure(n, m))
    assert ((pruned.reshape(16, -1, m) == 0).sum(-1) == n).all()


def test_dead_features_go_first():
    W = torch.tensor([[9.0, 0.1, 0.2, 0.3]])
    norms = torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert sparsify_weight(W, norms, 0.25, UNSTRUCTURED).tolist() == [[0.0, *W[0, 1:].tolist()]]
