import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.pruning.patterns import MaskStructure
from sinkprune_plugin.pruning.sparsegpt import (
    accumulate_hessian,
    invert_hessian,
    product_precision,
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


@pytest.mark.parametrize(
    ("structure", "sparsity"), [(UNSTRUCTURED, 0.75), (UNSTRUCTURED, 0.3), (MaskStructure(2, 4), 0.5)]
)
def test_fixed_zeros_stay_and_count(structure, sparsity):
    W, x = make_case(5, 32, 64)
    fixed = torch.rand(32, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    W[fixed] = 0.0
    H = torch.zeros(64, 64)
    accumulate_hessian(H, x, torch.ones(x.shape[:2]))
    factor = invert_hessian(H, 0.01, "proj")
    free, _ = sparsify_weight(W, factor, sparsity, structure, block_size=16)
    # Where less goes than is zero, nothing has an error to hand on.
    assert bool((free[fixed] != 0).any()) == (sparsity >= 0.5), "without the mask, updates fill zeros"
    pruned, _ = sparsify_weight(W, factor, sparsity, structure, block_size=16, fixed_zeros=fixed)
    assert (pruned[fixed] == 0).all()
    if structure.unstructured:
        # Each block of 16 columns has half of its 512 weights fixed, give or take.
        zeros = (pruned == 0).reshape(32, 4, 16).sum(dim=(0, 2))
        expected = fixed.reshape(32, 4, 16).sum(dim=(0, 2)).clamp(min=int(512 * sparsity))
        assert zeros.tolist() == expected.tolist()
    else:
        groups = (pruned == 0).reshape(32, 16, 4).sum(dim=-1)
        assert torch.equal(groups, fixed.reshape(32, 16, 4).sum(dim=-1).clamp(min=2))


def test_token_weights_scale_rows_before_the_outer_product():
    _, x = make_case(3, 1, 8, tokens=20)
    weights = torch.rand(1, 20)
    H = torch.zeros(8, 8)
    accumulate_hessian(H, x, weights)
    rows = (weights[0].double().unsqueeze(1)) * x[0].double()
    # 20 products in float32: 20 × 2⁻²⁴ relative to the largest entry.
    torch.testing.assert_close(H.double(), rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_the_weight_of_a_timestep_scales_the_sum():
    _, x = make_case(4, 1, 8, tokens=20)
    H, scaled = torch.zeros(8, 8), torch.zeros(8, 8)
    accumulate_hessian(H, x, torch.ones(1, 20))
    accumulate_hessian(scaled, x, torch.ones(1, 20), 7.0)
    # One float32 rounding.
    torch.testing.assert_close(scaled, 7 * H, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "device", "precision"),
    [
        (torch.bfloat16, "cuda", "tf32"),
        (torch.float16, "cuda", "tf32"),
        (torch.float32, "cuda", "ieee"),
        (torch.bfloat16, "cpu", None),
    ],
)
def test_the_precision_of_products_is_chosen_by_dtype_and_device(dtype, device, precision):
    assert product_precision(dtype, device) == precision


def to_tf32(x):
    """Round float32 to the eleven significant bits of TF32, to nearest even."""
    bits = x.view(torch.int32)
    bits = bits + 0xFFF + ((bits >> 13) & 1)
    return (bits & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_half_precision_are_exact_in_tf32(dtype):
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    assert torch.equal(to_tf32(x), x)
    # A soft weight rounds the row once, by at most half a unit of eleven bits.
    soft = 0.3 * x
    assert ((to_tf32(soft) - soft).abs() <= 2.0**-11 * soft.abs()).all()
    assert not torch.equal(to_tf32(soft), soft)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_hessians_on_a_gpu_are_as_exact_as_float32(dtype):
    x = torch.randn(2, 512, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = (torch.rand(2, 512, generator=torch.Generator().manual_seed(1)) > 0.1).float()
    H = torch.zeros(256, 256, device="cuda")
    before = torch.backends.cuda.matmul.fp32_precision
    accumulate_hessian(H, x.cuda(), weights.cuda())
    assert torch.backends.cuda.matmul.fp32_precision == before
    rows = (weights.double().unsqueeze(-1) * x.double()).flatten(0, 1)
    # 1024 float32 sums of exact products: 1024 × 2⁻²⁴ of the largest entry at the very most.
    torch.testing.assert_close(H.cpu().double(), rows.T @ rows, rtol=0, atol=1024 * 2.0**-24 * 1024)


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


def test_dampening_rises_until_an_indefinite_hessian_can_be_factored():
    H = torch.tensor([[1.0, 1.2], [1.2, 1.0]])
    factor = invert_hessian(H.clone(), 0.03, "proj")
    assert factor.dampening_frac == pytest.approx(0.3)
    # 1 + 0.3 of the mean diagonal, not 1 + 0.03 + 0.3.
    dampened = H + 0.3 * torch.eye(2)
    torch.testing.assert_close(factor.upper.T @ factor.upper, torch.linalg.inv(dampened))


def test_a_hessian_that_stays_indefinite_is_refused_by_name():
    H = torch.tensor([[1.0, 5.0], [5.0, 1.0]])
    with pytest.raises(UsageError, match=r"Hessian of block\.7\.proj .*even with dampening_frac 1;"):
        invert_hessian(H, 0.01, "block.7.proj")
