import pytest
import torch
from pruning_cases import error_of, make_layer, prepared

from sinkprune_plugin.pruning.obs import solve_kept
from sinkprune_plugin.pruning.unit_removal import choose_units, solve_levels, without_columns
from sinkprune_plugin.pruning.units import UnitGroup


def heads(total, together=1, columns_each=3):
    return UnitGroup("attention_heads", "attention heads", total, together, columns_each, 1)


@pytest.mark.parametrize("score", ["obs", "wanda", "magnitude"])
def test_levels_are_the_removals_of_each_width(score):
    W, _, H = make_layer(0, 6, 24)
    group = heads(8)
    solved = solve_levels(W, prepared(H, invertible=True), group, [2, 5, 8], score, compensate=True)
    whole = error_of(torch.zeros_like(W), W, H)
    for width, error, columns, weight in zip([2, 5, 8], solved.errors, solved.columns, solved.weights, strict=True):
        units = choose_units(W, prepared(H, invertible=True), group, width, score)
        assert torch.equal(columns, group.columns(units))
        expected, loss = solve_kept(W, columns, prepared(H))
        assert torch.equal(weight, expected[:, columns])
        # Nothing but rounding is left at the full width.
        assert error == pytest.approx(loss / whole, rel=1e-3, abs=1e-9)


def test_errors_alone_come_with_the_order():
    W, _, H = make_layer(1, 6, 24)
    with_weights, alone = (
        solve_levels(
            W, prepared(H, invertible=True), heads(8), [2, 5, 8], "obs", compensate=True, with_weights=with_weights
        )
        for with_weights in (True, False)
    )
    assert alone.weights == ()
    assert alone.errors == pytest.approx(with_weights.errors, rel=1e-3, abs=1e-9)


def test_groups_of_heads_go_together():
    W, _, H = make_layer(2, 6, 24)
    units = choose_units(W, prepared(H, invertible=True), heads(8, together=2), 4, "obs")
    assert len(units) == 2
    assert int(units.max()) < 4


def test_without_compensation_the_rest_stays_as_it_is():
    W, _, H = make_layer(3, 6, 12)
    columns = torch.tensor([0, 3, 7])
    pruned, loss = without_columns(W, columns, prepared(H), compensate=False)
    assert torch.equal(pruned[:, columns], W[:, columns])
    assert int((pruned != 0).any(dim=0).sum()) == 3
    assert loss == pytest.approx(error_of(pruned, W, H), rel=1e-4)
    assert loss > without_columns(W, columns, prepared(H), compensate=True)[1]
