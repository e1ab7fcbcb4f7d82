import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_cases import error_of, least_squares, make_layer, prepared

from sinkprune_plugin.pruning import hessian as hessian_module
from sinkprune_plugin.pruning.reconstruct import reconstruct


def random_mask(seed, shape, share=0.5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 6), st.integers(1, 24), st.sampled_from([0.0, 0.3, 0.8, 1.0]))
def test_equals_a_direct_solve(seed, rows, columns, share):
    W, _, H = make_layer(seed, rows, columns)
    mask = random_mask(seed, W.shape, share)
    solved, loss = reconstruct(W, mask, prepared(H), iterations=200)
    expected = least_squares(W, mask, H)
    # Converged in float32: condition number up to about 1e4, times 2⁻²⁴.
    torch.testing.assert_close(solved.double(), expected, rtol=2e-3, atol=2e-3)
    assert abs(loss - error_of(expected, W, H)) <= 1e-4 * error_of(torch.zeros_like(W), W, H)
    assert (solved[mask] == 0).all()


def test_every_step_lowers_the_error():
    W, _, H = make_layer(1, 16, 64)
    mask = random_mask(1, W.shape)
    losses = [reconstruct(W, mask, prepared(H), iterations=steps)[1] for steps in (0, 1, 2, 4, 8, 16, 32)]
    assert all(after < before for before, after in itertools.pairwise(losses))


@pytest.mark.parametrize("kept", [1, 3, 12])
def test_steps_after_the_solution_change_nothing(kept):
    # The worst six of seeds 0 to 399: unless solved rows are left alone, they grow, the first to 10¹⁵ in 200 steps.
    for seed in (277, 176, 213, 363, 122, 18):
        W, _, H = make_layer(seed, 4, 12)
        mask = random_mask(seed, W.shape, 0.3)
        mask[:, kept:] = True
        few, many = (reconstruct(W, mask, prepared(H), iterations=steps)[0] for steps in (30, 500))
        # Condition number up to about 1e4, times 2⁻²⁴.
        torch.testing.assert_close(many, few, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(many.double(), least_squares(W, mask, H), rtol=2e-3, atol=2e-3)


def test_dense_output_target_is_matched():
    W, x, H = make_layer(2, 5, 16)
    # What the dense model adds depends on x, so weights can follow it: x̄ = x Mᵀ.
    M = torch.eye(16) + 0.3 * torch.eye(16).roll(1, dims=0)
    dense = x @ M.T
    mask = random_mask(2, W.shape, 0.2)
    solved, _ = reconstruct(W, mask, prepared(H, (dense - x).T @ x, dampening=1e-4), iterations=200)
    plain, _ = reconstruct(W, mask, prepared(H), iterations=200)
    wanted = dense @ W.T
    best = least_squares(W @ M, mask, H, dampening=0.0).float()
    # All that is left to the best weights is the little dampening.
    assert (x @ solved.T - wanted).norm() < 1.01 * (x @ best.T - wanted).norm()
    assert (x @ solved.T - wanted).norm() < 0.9 * (x @ plain.T - wanted).norm()


def test_chunks_of_rows_change_nothing(monkeypatch):
    W, _, H = make_layer(3, 7, 32)
    mask = random_mask(3, W.shape)
    whole, loss = reconstruct(W, mask, prepared(H))
    monkeypatch.setattr(hessian_module, "CHUNK_BYTES", 2 * 32 * 4)
    parts, parts_loss = reconstruct(W, mask, prepared(H))
    # Products of other shapes sum in another order; 20 steps carry that on.
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4)
    assert abs(parts_loss - loss) <= 1e-4 * loss


def test_weights_of_dead_features_go_and_the_dtype_stays():
    W, x, _ = make_layer(4, 4, 8)
    x[:, 3] = 0
    W = W.bfloat16()
    before = W.clone()
    solved, _ = reconstruct(W, random_mask(4, W.shape), prepared(x.T @ x))
    assert solved.dtype == torch.bfloat16
    assert (solved[:, 3] == 0).all()
    assert solved.isfinite().all()
    assert torch.equal(W, before)
