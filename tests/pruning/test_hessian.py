import pytest
import torch
from pruning_cases import dampened, error_of, make_layer, prepared

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.pruning import hessian as hessian_module
from sinkprune_plugin.pruning.hessian import accumulate_drift, prepare_hessian, row_chunks


def test_scales_the_dampened_hessian_to_a_unit_diagonal():
    _, _, H = make_layer(0, 1, 24)
    result = prepared(H)
    assert (result.normalised.diagonal() == 1).all()
    # Two float32 divisions: a few units in the last place of the largest entry.
    restored = result.normalised.double() * torch.outer(result.scale.double(), result.scale.double())
    torch.testing.assert_close(restored, dampened(H), rtol=1e-6, atol=1e-6 * float(H.max()))


def test_drift_accumulates_the_dense_inputs_lead_weighted_twice():
    generator = torch.Generator().manual_seed(1)
    x, dense = torch.randn(2, 2, 5, 8, generator=generator)
    weights = torch.rand(2, 5, generator=generator)
    D = torch.zeros(8, 8)
    accumulate_drift(D, x, dense, weights)
    expected = torch.einsum("bt,btc,btd->cd", weights.double() ** 2, (dense - x).double(), x.double())
    # Ten products in float32.
    torch.testing.assert_close(D.double(), expected, rtol=1e-5, atol=1e-5)


def test_drift_of_bfloat16_inputs_is_accumulated_in_float32():
    D = torch.zeros(1, 1)
    ones = torch.ones(1, 4096, 1, dtype=torch.bfloat16)
    accumulate_drift(D, ones, 2 * ones, torch.ones(1, 4096))
    assert D.item() == 4096.0
    assert (ones == 1).all()


def test_dense_output_target_is_the_ridge_solution_toward_the_dense_weight():
    W, x, H = make_layer(2, 5, 16)
    generator = torch.Generator().manual_seed(3)
    dense = x + 0.3 * torch.randn(x.shape, generator=generator)
    result = prepared(H, (dense - x).T @ x)
    X, Y = x.double(), dense.double() @ W.double().T
    ridge = dampened(H) - X.T @ X
    expected = torch.linalg.solve(X.T @ X + ridge, X.T @ Y + ridge @ W.double().T).T
    # Float32 Cholesky of a matrix whose condition number the dampening holds below 1e3 or so: 1e3 × 2⁻²⁴ ≈ 1e-4.
    torch.testing.assert_close((result.target(W) / result.scale).double(), expected, rtol=1e-3, atol=1e-3)


def test_without_difference_between_the_streams_the_target_is_the_weight_itself():
    W, _, H = make_layer(4, 5, 16)
    result = prepared(H, torch.zeros_like(H))
    assert torch.equal(result.target(W), prepared(H).target(W))


def test_error_is_half_the_squared_output_error():
    W, _, H = make_layer(5, 6, 16)
    other = W + 0.1
    result = prepared(H)
    assert result.error((other - W) * result.scale) == pytest.approx(error_of(other, W, H), rel=1e-4)


def test_resolvent_inverts_and_is_kept():
    _, _, H = make_layer(6, 1, 16)
    result = prepared(H)
    identity = result.resolvent(0.5) / 0.5 @ (result.normalised + 0.5 * torch.eye(16))
    # Condition number at most (16 + 0.5) / 0.5.
    torch.testing.assert_close(identity, torch.eye(16), rtol=0, atol=1e-5)
    assert result.resolvent(0.5) is result.resolvent(0.5)
    rounded = result.resolvent(0.5).bfloat16()
    assert torch.equal(result.resolvent(0.5, torch.bfloat16), rounded)
    assert result.resolvent(2.0) is not result.resolvent(0.5)


@pytest.mark.parametrize("dead", [0, 3])
def test_flatness_is_that_of_the_spectrum_of_the_features_in_use(dead):
    _, x, _ = make_layer(7, 1, 16)
    x[:, :dead] = 0
    result = prepared(x.T @ x, invertible=True)
    eigenvalues = torch.linalg.eigvalsh(result.normalised[dead:, dead:].double())
    assert result.flatness == pytest.approx(float(eigenvalues.log().mean().exp() / eigenvalues.mean()), rel=1e-4)
    # With a drift or without one, and whether or not the factor is kept.
    assert prepared(x.T @ x, 0 * x.T @ x).flatness == prepared(x.T @ x).flatness == result.flatness


def test_flatness_of_inputs_that_do_not_correlate_is_one():
    assert prepared(torch.diag(torch.tensor([1.0, 4.0, 9.0, 0.0]))).flatness == pytest.approx(1.0)
    # Nothing in use at all.
    assert prepared(torch.zeros(4, 4)).flatness == 1.0


@pytest.mark.parametrize("drift", [None, torch.zeros(2, 2)])
def test_dampening_rises_until_an_indefinite_hessian_can_be_factored(drift):
    H = torch.tensor([[1.0, 1.2], [1.2, 1.0]])
    result = prepare_hessian(H.clone(), 0.03, "proj", drift=drift)
    assert result.dampening_frac == pytest.approx(0.3)
    # 1 + 0.3 of the mean diagonal, not 1 + 0.03 + 0.3.
    torch.testing.assert_close(result.scale, torch.full((2,), 1.3).sqrt())


def test_a_hessian_that_stays_indefinite_is_refused_by_name():
    H = torch.tensor([[1.0, 5.0], [5.0, 1.0]])
    with pytest.raises(UsageError, match=r"Hessian of block\.7\.proj .*dampening_frac 1;"):
        prepare_hessian(H, 0.01, "block.7.proj", drift=torch.zeros(2, 2))


def test_a_hessian_that_is_not_finite_is_refused_by_name():
    H = torch.eye(2)
    H[1, 1] = torch.nan
    with pytest.raises(UsageError, match=r"block\.7\.proj has NaN"):
        prepare_hessian(H, 0.01, "block.7.proj")


def test_chunks_cover_all_rows_within_the_limit(monkeypatch):
    assert row_chunks(4096, 12288) == [slice(0, 2730), slice(2730, 4096)]
    monkeypatch.setattr(hessian_module, "CHUNK_BYTES", 100)
    assert row_chunks(5, 10) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert row_chunks(2, 1000) == [slice(0, 1), slice(1, 2)]
