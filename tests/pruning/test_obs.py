import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_cases import error_of, least_squares, make_layer, prepared

from sinkprune_plugin.pruning import obs
from sinkprune_plugin.pruning.obs import obs_path, score_path, solve_kept


def columns_mask(W, units, width):
    """(rows, C) True in the columns of these units."""
    mask = torch.zeros(W.shape[1] // width, dtype=torch.bool)
    mask[list(units)] = True
    return mask.repeat_interleave(width).expand(W.shape)


def least_error(W, H, units, width, target=None):
    """Half the squared error with these units gone and every other weight solved for, in float64."""
    target = W if target is None else target
    return error_of(least_squares(target, columns_mask(W, units, width), H), target, H)


def units_of(width, max_units=8):
    return st.integers(2, max_units).map(lambda count: count * width)


@settings(deadline=None, max_examples=25)
@given(st.data(), st.integers(0, 1000), st.sampled_from([1, 2, 3]), st.sampled_from([1, 3, 128]))
def test_every_step_removes_the_unit_whose_loss_is_least(data, seed, width, lazy):
    """Against all candidates, each with its own direct least squares."""
    columns = data.draw(units_of(width))
    W, _, H = make_layer(seed, 5, columns)
    count = columns // width
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(obs, "LAZY_COLUMNS", lazy)
        path = obs_path(W, prepared(H, invertible=True), width, count - 1)
    whole = error_of(torch.zeros_like(W), W, H)
    gone = []
    for unit, error in zip(path.order.tolist(), path.errors[1:].tolist(), strict=True):
        errors = {u: least_error(W, H, [*gone, u], width) for u in range(count) if u not in gone}
        # Float32 with condition numbers up to 1e4.
        assert errors[unit] <= min(errors.values()) + 2e-3 * whole
        assert abs(error - errors[unit]) <= 2e-3 * whole
        gone.append(unit)
    assert len(set(gone)) == count - 1


def test_the_first_unit_is_that_of_brute_force_for_any_pair():
    """Greedy removal of two from eight is close to the best of all 28 pairs, and often is it."""
    exact = 0
    for seed in range(20):
        W, _, H = make_layer(seed, 6, 8)
        path = obs_path(W, prepared(H, invertible=True), 1, 2)
        pairs = {pair: least_error(W, H, pair, 1) for pair in itertools.combinations(range(8), 2)}
        best = min(pairs.values())
        found = pairs[tuple(sorted(path.order.tolist()))]
        exact += found <= best * (1 + 1e-6)
        assert found <= 1.6 * best
    assert exact >= 12


@pytest.mark.parametrize(("width", "lazy"), [(1, 1), (1, 7), (1, 32), (4, 1), (4, 8), (4, 12)])
def test_waiting_removals_change_nothing(width, lazy, monkeypatch):
    W, _, H = make_layer(3, 24, 64)
    plain = obs_path(W, prepared(H, invertible=True), width, 40 // width)
    monkeypatch.setattr(obs, "LAZY_COLUMNS", lazy)
    again = obs_path(W, prepared(H, invertible=True), width, 40 // width)
    assert torch.equal(again.order, plain.order)
    # Sums in another order.
    torch.testing.assert_close(again.errors, plain.errors, rtol=1e-4, atol=0)


def test_errors_are_those_of_the_solved_weights_over_a_long_path():
    """256 of 320 columns one after the other: what float32 loses on the way."""
    W, _, H = make_layer(4, 48, 320)
    hessian = prepared(H, invertible=True)
    path = obs_path(W, hessian, 1, 256)
    for removed in (1, 64, 128, 256):
        kept = path.kept(320, 320 - removed)
        assert len(kept) == 320 - removed
        solved, loss = solve_kept(W, kept, hessian)
        assert loss == pytest.approx(float(path.errors[removed]), rel=1e-3)
        assert loss == pytest.approx(error_of(solved, W, H), rel=1e-3)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 6), st.integers(2, 24))
def test_kept_columns_are_solved_exactly(seed, rows, columns):
    W, _, H = make_layer(seed, rows, columns)
    kept = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))[: columns // 2 + 1].sort().values
    solved, _ = solve_kept(W, kept, prepared(H))
    removed = torch.ones(columns, dtype=torch.bool)
    removed[kept] = False
    expected = least_squares(W, removed.expand(W.shape), H)
    torch.testing.assert_close(solved.double(), expected, rtol=2e-3, atol=2e-3)
    assert (solved[:, removed] == 0).all()


def test_single_zeros_stay_while_columns_go():
    W, _, H = make_layer(5, 12, 32)
    zeros = torch.rand(W.shape, generator=torch.Generator().manual_seed(5)) < 0.4
    W = W.masked_fill(zeros, 0.0)
    kept = torch.arange(0, 32, 2)
    solved, loss = solve_kept(W, kept, prepared(H), fixed_zeros=zeros)
    mask = zeros.clone()
    mask[:, 1::2] = True
    assert (solved[mask] == 0).all()
    assert loss <= 1.01 * error_of(least_squares(W, mask, H), W, H)
    untouched, _ = solve_kept(W, kept, prepared(H), fixed_zeros=torch.zeros_like(zeros))
    assert torch.equal(untouched, solve_kept(W, kept, prepared(H))[0])


def test_dense_output_target_counts_in_choice_and_solution():
    W, x, H = make_layer(6, 8, 12)
    dense = x + 0.5 * x.roll(1, dims=1)
    hessian = prepared(H, (dense - x).T @ x, invertible=True)
    target = (hessian.target(W) / hessian.scale).double()
    path = obs_path(W, hessian, 3, 1)
    errors = [least_error(W, H, [unit], 3, target) for unit in range(4)]
    assert int(path.order[0]) == min(range(4), key=errors.__getitem__)
    assert float(path.errors[1]) == pytest.approx(min(errors), rel=1e-3)
    solved, loss = solve_kept(W, torch.arange(3, 12), hessian)
    assert loss == pytest.approx(error_of(solved, target, H), rel=1e-3)


def test_features_that_were_never_active_go_first_and_cost_nothing():
    W, _, H = make_layer(7, 4, 10)
    H[[2, 5]] = 0.0
    H[:, [2, 5]] = 0.0
    path = obs_path(W, prepared(H, invertible=True), 1, 3)
    assert set(path.order[:2].tolist()) == {2, 5}
    assert path.errors[:3].tolist() == [0.0, 0.0, 0.0]
    solved, _ = solve_kept(W, torch.arange(6), prepared(H))
    assert (solved[:, 2] == 0).all()
    assert score_path(W, prepared(H), 1, 2).tolist() == [2, 5]


def test_scores_of_units_are_sums_over_their_columns():
    W, _, H = make_layer(8, 4, 12)
    norms = W.square().sum(dim=0)
    for hessian, scores in ((None, norms), (prepared(H, dampening=1e-6), norms * H.diagonal())):
        expected = scores.view(4, 3).sum(dim=1).argsort()[:3]
        assert torch.equal(score_path(W, hessian, 3, 3), expected)


def test_nothing_to_remove():
    W, _, H = make_layer(9, 4, 6)
    path = obs_path(W, prepared(H, invertible=True), 2, 0)
    assert path.order.numel() == 0
    assert path.errors.tolist() == [0.0]
    assert path.kept(3, 3).tolist() == [0, 1, 2]


def test_low_precision_weights_keep_their_dtype():
    W, _, H = make_layer(10, 4, 6)
    solved, _ = solve_kept(W.bfloat16(), torch.arange(4), prepared(H))
    assert solved.dtype == torch.bfloat16
