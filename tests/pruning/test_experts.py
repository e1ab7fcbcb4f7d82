"""Scores of experts and the choice of those that stay, against plain references."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.pruning import experts as module
from sinkprune_plugin.pruning.experts import (
    ExpertLayer,
    RoutedSums,
    WeightSums,
    experts_that_stay,
    weight_importance,
)


def make_experts(number, seed=0, dtype=torch.float32):
    """Three matrices for each expert, of weights ever more unlike in size."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((24, 16), (24, 16), (16, 24))
    return [
        [(torch.randn(shape, generator=generator).abs() ** (1 + index / 4)).to(dtype) for shape in shapes]
        for index in range(number)
    ]


def sums_of(matrices):
    sums = WeightSums()
    for matrix in matrices:
        sums.add(matrix)
    return sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_aimer_is_the_mean_absolute_weight_over_the_root_mean_square_of_all_matrices_together(dtype, monkeypatch):
    # Pieces smaller than a matrix.
    monkeypatch.setattr(module, "_PIECE", 100)
    for matrices in make_experts(3, dtype=dtype):
        together = torch.cat([matrix.flatten().double() for matrix in matrices])
        expected = together.abs().mean() / together.square().mean().sqrt()
        # Sums of 100 terms in float32.
        assert sums_of(matrices).aimer == pytest.approx(float(expected), rel=1e-6)
        assert sums_of(matrices).norm == pytest.approx(float(together.norm()), rel=1e-6)


def test_aimer_removes_the_experts_whose_weights_are_most_alike():
    """As the published code does: "higher AIMER scores are treated as more removable"."""
    importance = weight_importance([sums_of(matrices) for matrices in make_experts(4)], "aimer", "layer 0")
    # Later experts have heavier tails, hence lower scores.
    assert importance.tolist() == sorted(importance.tolist())
    assert experts_that_stay(importance, 2) == [2, 3]
    assert importance.max() < 0


def test_aimer_does_not_change_with_scale_and_magnitude_does():
    (matrices,) = make_experts(1)
    half = [matrix / 2 for matrix in matrices]
    assert sums_of(half).aimer == pytest.approx(sums_of(matrices).aimer, rel=1e-6)
    assert sums_of(half).norm == pytest.approx(sums_of(matrices).norm / 2, rel=1e-6)
    assert weight_importance([sums_of(half), sums_of(matrices)], "magnitude", "layer 0").argmin() == 0


def test_an_expert_of_zeros_scores_zero_and_one_with_nan_is_refused():
    assert sums_of([torch.zeros(3, 3)]).aimer == 0.0
    broken = [sums_of([torch.ones(2, 2)]), sums_of([torch.tensor([[1.0, math.nan]])])]
    with pytest.raises(UsageError, match="weights of expert 1 of layer 0 aren't finite"):
        weight_importance(broken, "aimer", "layer 0")


def test_reap_is_the_mean_over_routed_tokens_of_router_weight_times_output_norm():
    generator = torch.Generator().manual_seed(1)
    sums = RoutedSums(3)
    expected, counts = [[], []], []
    for expert, number in ((0, 5), (1, 3), (0, 4)):
        outputs, gates = torch.randn(number, 8, generator=generator), torch.rand(number, generator=generator)
        sums.add(expert, outputs, gates, torch.ones(number))
        expected[expert] += [float(gate * output.norm()) for gate, output in zip(gates, outputs, strict=True)]
    counts = [len(values) for values in expected]
    importance = sums.importance("reap")
    # Norms in float32.
    assert importance[:2].tolist() == pytest.approx([sum(v) / len(v) for v in expected], rel=1e-6)
    assert importance[2] == 0.0
    assert sums.importance("frequency").tolist() == pytest.approx([counts[0] / 12, counts[1] / 12, 0.0])


def test_a_token_of_weight_zero_does_not_count():
    sums, without = RoutedSums(1), RoutedSums(1)
    outputs, gates = torch.randn(4, 8), torch.rand(4)
    outputs[2] *= 1000
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0])
    sums.add(0, outputs, gates, weights)
    without.add(0, outputs[weights > 0], gates[weights > 0], weights[weights > 0])
    assert sums.importance("reap").tolist() == pytest.approx(without.importance("reap").tolist(), rel=1e-6)
    assert sums.tokens.tolist() == [3.0]


@given(st.integers(1, 4), st.integers(1, 6), st.data())
def test_the_least_important_of_each_group_go(groups, each, data):
    values = data.draw(st.lists(st.integers(0, 5), min_size=groups * each, max_size=groups * each))
    removed = data.draw(st.integers(0, each))
    kept = experts_that_stay(torch.tensor(values, dtype=torch.float64), removed * groups, groups)
    assert kept == sorted(kept)
    for group in range(groups):
        members = range(group * each, (group + 1) * each)
        ranked = sorted(members, key=lambda number: (-values[number], number))
        assert [number for number in kept if number in members] == sorted(ranked[: each - removed])


@pytest.mark.parametrize(
    ("layer", "amount", "removed"),
    [
        (ExpertLayer(64, 8), 0.25, 16),
        (ExpertLayer(64, 8), 16, 16),
        (ExpertLayer(64, 8), 56, 56),
        (ExpertLayer(64, 8), 0, 0),
        # Halfway between 2 and 3, more stay.
        (ExpertLayer(10, 2), 0.25, 2),
        (ExpertLayer(10, 2), 0.26, 3),
        (ExpertLayer(256, 8, groups=8, chosen_groups=4), 0.5, 128),
        # 25.6, of which 24 is the nearest multiple of 8.
        (ExpertLayer(256, 8, groups=8, chosen_groups=4), 0.1, 24),
        (ExpertLayer(256, 8, groups=8, chosen_groups=4), 240, 240),
    ],
)
def test_an_amount_is_a_share_or_a_number(layer, amount, removed):
    assert layer.removed(amount, "layer 0") == removed


@pytest.mark.parametrize(
    ("layer", "amount", "message"),
    [
        (ExpertLayer(64, 8), 1.0, "neither a share"),
        (ExpertLayer(64, 8), -0.1, "neither a share"),
        (ExpertLayer(64, 8), -1, "neither a share"),
        (ExpertLayer(64, 8), True, "neither a share"),
        (ExpertLayer(64, 8), math.nan, "neither a share"),
        (ExpertLayer(64, 8), 57, "leaves 7 of the 64 experts of layer 0, whose router chooses 8; remove at most 56"),
        (ExpertLayer(64, 8), 0.9, "leaves 6 of the 64 experts"),
        (ExpertLayer(64, 8), 99, "leaves 0 of the 64 experts"),
        (ExpertLayer(256, 8, groups=8, chosen_groups=4), 100, "multiple of the 8 groups.*give 96 or 104"),
        # A group's rank takes two of its experts.
        (ExpertLayer(16, 4, groups=4, chosen_groups=4), 12, "chooses 4 in 4 of 4 groups; remove at most 8"),
        # Two in each of four groups are the eight that a token chooses.
        (ExpertLayer(256, 8, groups=8, chosen_groups=4), 248, "chooses 8 in 4 of 8 groups; remove at most 240"),
    ],
)
def test_an_impossible_amount_is_refused_with_the_number_that_is_possible(layer, amount, message):
    with pytest.raises(UsageError, match=message):
        layer.removed(amount, "layer 0")
