"""Exchanges of kept and removed weights, against all exchanges tried one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_cases import make_layer, prepared

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.pruning import hessian as hessian_module
from sinkprune_plugin.pruning import swaps
from sinkprune_plugin.pruning.admm import ADMMOptions, solve
from sinkprune_plugin.pruning.patterns import MaskStructure
from sinkprune_plugin.pruning.swaps import exchange

STRUCTURES = [MaskStructure(0, 0), MaskStructure(2, 4), MaskStructure(2, 8)]


def start(seed, rows, columns, structure):
    """A pruned weight on which the mask isn't the best one: (Z, mask, target, Hn)."""
    W, _, H = make_layer(seed, rows, columns)
    hessian = prepared(H)
    target = hessian.target(W)
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, columns // (structure.m or columns), structure.m or columns, generator=generator)
    count = structure.n or columns // 2
    mask = torch.zeros_like(order, dtype=torch.bool).scatter_(2, order.argsort(dim=2)[..., :count], True)
    mask = mask.flatten(1)
    return target.masked_fill(mask, 0.0), mask, target, hessian.normalised


def error_of_row(z, target, Hn):
    difference = (z - target).double()
    return float(0.5 * difference @ Hn.double() @ difference)


def best_by_trial(z, mask, target, Hn, structure):
    """Lowest error of a row after one exchange, every pair tried and the value that comes in minimised."""
    lowest = error_of_row(z, target, Hn)
    for p in torch.nonzero(~mask).flatten().tolist():
        for q in torch.nonzero(mask).flatten().tolist():
            if not structure.unstructured and p // structure.m != q // structure.m:
                continue
            trial = z.clone()
            trial[p] = trial[q] = 0.0
            slope = ((trial - target).double() @ Hn.double())[q] / Hn[q, q]
            trial[q] = -slope
            lowest = min(lowest, error_of_row(trial, target, Hn))
    return lowest


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 4), st.sampled_from(STRUCTURES))
def test_one_exchange_is_the_best_one(seed, rows, structure):
    Z, mask, target, Hn = start(seed, rows, 16, structure)
    expected = [best_by_trial(*each, Hn, structure) for each in zip(Z.clone(), mask.clone(), target, strict=True)]
    exchange(Z, mask, target, Hn, structure, torch.zeros_like(mask), 1)
    for z, row, lowest in zip(Z, target, expected, strict=True):
        # LEAST_GAIN, and float32 in the choice among near ties.
        assert error_of_row(z, row, Hn) == pytest.approx(lowest, rel=2e-4, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 5), st.sampled_from(STRUCTURES), st.integers(1, 12))
def test_the_error_falls_and_the_counts_stay(seed, rows, structure, most):
    Z, mask, target, Hn = start(seed, rows, 24, structure)
    fixed = torch.zeros_like(mask)
    # A zero of each row that must stay.
    for row in range(rows):
        fixed[row, torch.nonzero(mask[row])[0]] = True
    groups = (-1, structure.m or 24)
    before = [error_of_row(*each, Hn) for each in zip(Z, target, strict=True)]
    counts = mask.unflatten(1, groups).sum(-1)
    made = exchange(Z, mask, target, Hn, structure, fixed, most)
    after = [error_of_row(*each, Hn) for each in zip(Z, target, strict=True)]
    assert made <= most * rows
    assert all(now <= then * (1 + 1e-6) for now, then in zip(after, before, strict=True))
    assert (made > 0) == any(now < then * (1 - 0.5e-5) for now, then in zip(after, before, strict=True))
    assert torch.equal(mask.unflatten(1, groups).sum(-1), counts)
    assert torch.equal(Z == 0, mask)
    assert mask[fixed].all()


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_rows_in_many_chunks_give_the_same(monkeypatch, structure):
    results = []
    for limit in (2**27, 1):
        monkeypatch.setattr(hessian_module, "CHUNK_BYTES", limit)
        Z, mask, target, Hn = start(3, 7, 24, structure)
        exchange(Z, mask, target, Hn, structure, torch.zeros_like(mask), 5)
        results.append(Z)
    torch.testing.assert_close(*results)


def test_only_the_cheapest_kept_weights_are_looked_at(monkeypatch):
    """With more kept weights than candidates, here two, the error still falls, but not as far as it could."""
    errors = []
    for candidates in (64, 2):
        monkeypatch.setattr(swaps, "CANDIDATES", candidates)
        Z, mask, target, Hn = start(1, 6, 32, STRUCTURES[0])
        before = sum(error_of_row(*each, Hn) for each in zip(Z, target, strict=True))
        exchange(Z, mask, target, Hn, STRUCTURES[0], torch.zeros_like(mask), 3)
        errors.append(sum(error_of_row(*each, Hn) for each in zip(Z, target, strict=True)))
    assert errors[0] <= errors[1] < before


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_the_solver_exchanges_after_its_iterations(structure):
    sparsity = 0.75 if structure.unstructured else structure.n / structure.m
    lower = 0
    for seed in range(8):
        W, _, H = make_layer(seed, 24, 64)
        plain, exchanged = (
            solve(W, prepared(H), sparsity, structure, ADMMOptions(mask_swaps=number)) for number in (0, 30)
        )
        assert exchanged[1] <= plain[1]
        assert (exchanged[0] == 0).sum() == (plain[0] == 0).sum()
        lower += exchanged[1] < plain[1]
    # The solver's own masks leave some layers nothing to exchange.
    assert lower >= 4


def test_a_negative_number_is_refused():
    with pytest.raises(UsageError, match="mask_swaps is -1"):
        ADMMOptions(mask_swaps=-1)
