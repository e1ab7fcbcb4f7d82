import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers.mask_structure import MaskStructure
from sinkprune_plugin.modifiers.sparsegpt.sparsegpt_sparsify import (
    accumulate_hessian,
    invert_hessian,
    sparsify_weight,
)

UNSTRUCTURED = MaskStructure(0, 0)


def naive_sweep(W, H, sparsity, structure, block_size, dampening):
    """SparseGPT from its definition (arXiv 2301.00774, algorithm 1), no lazy updates, in float64."""
    W, H = W.double().clone(), H.double().clone()
    columns = W.shape[1]
    dead = H.diagonal() == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    H += dampening * H.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    mask = torch.zeros_like(W, dtype=torch.bool)
    for j in range(columns):
        if structure.unstructured and j % block_size == 0:
            stop = min(j + block_size, columns)
            scores = W[:, j:stop] ** 2 / U.diagonal()[j:stop] ** 2
            chosen = scores.flatten().argsort(stable=True)[: int(scores.numel() * sparsity + 1e-9)]
            mask[:, j:stop] = torch.zeros(scores.numel(), dtype=torch.bool).index_fill(0, chosen, True).view_as(scores)
        elif not structure.unstructured and j % structure.m == 0:
            group = slice(j, j + structure.m)
            scores = W[:, group] ** 2 / U.diagonal()[group] ** 2
            chosen = scores.argsort(dim=1, stable=True)[:, : structure.n]
            mask[:, group] = torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)
        error = torch.where(mask[:, j], W[:, j], 0.0) / U[j, j]
        W[:, j:] -= error.unsqueeze(1) * U[j, j:].unsqueeze(0)
    return W.masked_fill(mask, 0.0), mask


def make_case(seed, rows, columns, tokens=200):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    x = torch.randn(1, tokens, columns, generator=generator) @ mixing
    return torch.randn(rows, columns, generator=generator), x


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 1000),
    st.integers(1, 6),
    st.integers(1, 5),
    st.sampled_from(
        [(UNSTRUCTURED, 0.5), (UNSTRUCTURED, 0.75), (MaskStructure(2, 4), 0.5), (MaskStructure(4, 8), 0.5)]
    ),
    st.sampled_from([3, 8, 16, 128]),
)
def test_equals_the_sweep_from_the_definition(seed, rows, groups, case, block_size):
    structure, sparsity = case
    columns = 8 * groups
    W, x = make_case(seed, rows, columns)
    H = torch.zeros(columns, columns)
    accumulate_hessian(H, x, torch.ones(x.shape[:2]))
    factor = invert_hessian(H.clone(), 0.01, "proj")
    pruned, loss = sparsify_weight(W, factor, sparsity, structure, block_size=block_size)
    expected, mask = naive_sweep(W, H, sparsity, structure, block_size, 0.01)
    assert loss >= 0
    # Float32 Cholesky of a Hessian with condition number up to 1e4 against float64: 1e4 × 2⁻²⁴ ≈ 1e-3 of the weights'
    # size. A score that is nearly a tie may then fall to the other side, which moves that one weight.
    differing = (pruned == 0) != mask
    assert differing.float().mean() <= 0.02
    alike = ~differing.any(dim=1)
    torch.testing.assert_close(pruned[alike].double(), expected[alike], rtol=5e-3, atol=5e-3 * float(W.abs().max()))


@pytest.mark.parametrize(
    ("structure", "sparsity"), [(UNSTRUCTURED, 0.5), (UNSTRUCTURED, 0.3), (MaskStructure(2, 4), 0.5)]
)
def test_reaches_the_sparsity_exactly(structure, sparsity):
    W, x = make_case(1, 32, 64)
    H = torch.zeros(64, 64)
    accumulate_hessian(H, x, torch.ones(x.shape[:2]))
    pruned, _ = sparsify_weight(W, invert_hessian(H, 0.01, "proj"), sparsity, structure, block_size=16)
    zeros = int((pruned == 0).sum())
    # Unstructured: floor over each block of 16 columns × 32 rows.
    assert zeros == 4 * int(16 * 32 * sparsity + 1e-9)


def test_keeps_the_outputs_better_than_the_mask_alone():
    W, x = make_case(2, 16, 64)
    H = torch.zeros(64, 64)
    accumulate_hessian(H, x, torch.ones(x.shape[:2]))
    pruned, _ = sparsify_weight(W, invert_hessian(H, 0.01, "proj"), 0.5, UNSTRUCTURED, block_size=128)
    masked = W.masked_fill(pruned == 0, 0.0)
    dense = x[0] @ W.T
    assert (x[0] @ pruned.T - dense).norm() < 0.8 * (x[0] @ masked.T - dense).norm()


def test_token_weights_scale_rows_before_the_outer_product():
    _, x = make_case(3, 1, 8, tokens=20)
    weights = torch.rand(1, 20)
    H = torch.zeros(8, 8)
    accumulate_hessian(H, x, weights)
    rows = (weights[0].double().unsqueeze(1)) * x[0].double()
    # 20 products in float32: 20 × 2⁻²⁴ relative to the largest entry.
    torch.testing.assert_close(H.double(), rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_bfloat16_inputs_are_accumulated_in_float32():
    H = torch.zeros(1, 1)
    accumulate_hessian(H, torch.ones(1, 4096, 1, dtype=torch.bfloat16), torch.ones(1, 4096))
    assert H.item() == 4096.0


def test_weights_of_dead_features_go():
    W, x = make_case(4, 4, 8)
    x[..., 3] = 0
    H = torch.zeros(8, 8)
    accumulate_hessian(H, x, torch.ones(x.shape[:2]))
    pruned, _ = sparsify_weight(W, invert_hessian(H, 0.01, "proj"), 0.25, UNSTRUCTURED, block_size=8)
    assert (pruned[:, 3] == 0).all()
    assert torch.isfinite(pruned).all()


def test_an_indefinite_hessian_is_refused_by_name():
    H = torch.tensor([[1.0, 5.0], [5.0, 1.0]])
    with pytest.raises(UsageError, match=r"Hessian of block\.7\.proj .*dampening_frac 0.01"):
        invert_hessian(H, 0.01, "block.7.proj")
