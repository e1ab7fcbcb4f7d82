import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkprune_plugin.pruning.patterns import MaskStructure
from sinkprune_plugin.pruning.wanda import ActivationNorms, sparsify_weight, weighted_square_sums

UNSTRUCTURED = MaskStructure(0, 0)


def plain_square_sums(x, weights):
    """(B, C) float64: rows are scaled, then squares are summed."""
    return (weights.double().unsqueeze(-1) * x.double()).square().sum(dim=1)


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 10_000),
    passes=st.integers(1, 3),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 40),
    columns=st.integers(1, 12),
)
def test_activation_norms_equal_the_definition(seed, passes, batch, tokens, columns):
    generator = torch.Generator().manual_seed(seed)
    cases = [
        (
            torch.randn(batch, tokens, columns, generator=generator),
            # Mostly 0 and 1, some soft: what the sigmoid gives.
            torch.rand(batch, tokens, generator=generator).round(decimals=1),
            1 + 9 * float(torch.rand(1, generator=generator)),
        )
        for _ in range(passes)
    ]
    squares = [scale * plain_square_sums(x, weights) for x, weights, scale in cases]
    expected = {
        "sum_of_norms": sum(terms.sqrt().sum(dim=0) for terms in squares),
        "sum_of_squares": sum(terms.sum(dim=0) for terms in squares).sqrt(),
    }
    for aggregation, norms in expected.items():
        gathered = ActivationNorms(aggregation)
        for x, weights, scale in cases:
            gathered.add(x, weights, scale)
        # Sums of at most 40 float32 squares: relative error below 40 × 2⁻²⁴ on the sum, half of that on its root.
        torch.testing.assert_close(gathered.norms(), norms, rtol=3e-6, atol=1e-6)


def test_a_row_without_weight_leaves_nothing_behind():
    """A massive row would swallow the small ones if it were summed first and subtracted later."""
    x = torch.full((1, 100, 1), 1e-2)
    x[0, 7] = 1e4
    weights = torch.ones(1, 100)
    weights[0, 7] = 0.0
    # 99 × 1e-4 = 9.9e-3; a float32 unit of 1e8 is 8, so a subtraction could not be right by any tolerance.
    torch.testing.assert_close(weighted_square_sums(x, weights), torch.tensor([[9.9e-3]]), rtol=1e-5, atol=0)


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
