"""How many experts each layer loses: exact totals, floors of the routers, and the levels of a search."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.pruning.expert_allocation import ExpertGrid, removed_by_error, removed_over_depth
from sinkprune_plugin.pruning.experts import ExpertLayer

LAYER = ExpertLayer(64, 8)
GROUPED = ExpertLayer(256, 8, groups=8, chosen_groups=4)


def test_removed_by_error_takes_the_cheapest_of_all_layers():
    layers = [ExpertLayer(4, 1), ExpertLayer(4, 1)]
    importances = [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([100.0, 900.0, 900.0, 900.0])]
    assert removed_by_error(importances, layers, 3, relative=False) == [3, 0]
    # Of shares 0.1, 0.2, 0.3 and 0.04 these are the first three.
    assert removed_by_error(importances, layers, 3, relative=True) == [2, 1]


def test_removed_by_error_leaves_each_router_its_choice():
    importances = [torch.arange(8.0) / 1000, torch.arange(8.0) + 1]
    assert removed_by_error(importances, [ExpertLayer(8, 2)] * 2, 8, relative=False) == [6, 2]
    with pytest.raises(UsageError, match=r"13 experts of all layers together can't go.*at most 12 can"):
        removed_by_error(importances, [ExpertLayer(8, 2)] * 2, 13, relative=False)


def test_removed_by_error_takes_from_each_group():
    layers = [ExpertLayer(8, 2, groups=2, chosen_groups=1)] * 2
    importances = [torch.tensor([0.0, 0.1, 9.0, 9.0, 5.0, 5.0, 9.0, 9.0]), torch.full((8,), 3.0)]
    # A step of the first layer costs (0 + 5) / 2, one of the second 3.
    assert removed_by_error(importances, layers, 6, relative=False) == [4, 2]


@st.composite
def mixtures(draw):
    """Layers of one family, and how many of each go evenly."""
    groups = draw(st.sampled_from([1, 4]))
    chosen = draw(st.integers(1, 3)) * groups
    layers, removed = [], []
    for _ in range(draw(st.integers(2, 8))):
        least = ExpertLayer(10**6, chosen, groups, groups).fewest
        experts = least + groups * draw(st.integers(0, 20))
        layers.append(ExpertLayer(experts, chosen, groups, groups))
        removed.append(groups * draw(st.integers(0, (experts - least) // groups)))
    return layers, removed


@given(mixtures(), st.floats(-0.9, 0.9))
def test_the_total_over_the_depth_is_exact_and_routers_keep_their_choice(mixture, spread):
    layers, removed = mixture
    if not 0 < sum(removed) < sum(layer.experts for layer in layers):
        return
    found = removed_over_depth(layers, sum(removed), spread)
    assert sum(found) == sum(removed)
    for layer, number in zip(layers, found, strict=True):
        assert 0 <= number <= layer.experts - layer.fewest
        assert number % layer.groups == 0


def test_shares_fall_or_rise_linearly():
    assert removed_over_depth([LAYER] * 5, 80, 0.125) == [24, 20, 16, 12, 8]
    assert removed_over_depth([LAYER] * 5, 80, -0.125) == [8, 12, 16, 20, 24]
    # 16 ± 6.4 and ± 3.2: of the remainders those of the second and the last are the largest.
    assert removed_over_depth([LAYER] * 5, 80, 0.1) == [22, 19, 16, 13, 10]
    assert removed_over_depth([GROUPED] * 3, 3 * 128, 0.1) == [152, 128, 104]


def test_what_a_router_can_not_lose_goes_from_others():
    # 0.5 ± 0.25 of 8: the first would lose 6 and keep 2, of which its tokens need 4.
    assert removed_over_depth([ExpertLayer(8, 4), ExpertLayer(8, 1), ExpertLayer(8, 1)], 12, 0.4) == [4, 5, 3]


@given(mixtures(), st.integers(0, 10**6))
def test_every_candidate_has_the_total_and_leaves_routers_their_choice(mixture, seed):
    layers, removed = mixture
    step = max(layer.groups for layer in layers)
    if sum(layer.experts - layer.fewest >= step for layer in layers) < 2:
        with pytest.raises(UsageError, match="nothing to allocate"):
            ExpertGrid.around(layers, removed)
        return
    grid = ExpertGrid.around(layers, removed)
    even = [layer.experts - number for layer, number in zip(layers, removed, strict=True)]
    uniform = grid.nearest(even, seed)
    assert uniform is not None
    assert grid.counts(uniform) == even
    generator = random.Random(seed)
    candidate = grid.space.fit([generator.randrange(len(levels)) for levels in grid.kept], generator)
    assert candidate is not None
    counts = grid.counts(candidate)
    assert sum(counts) == sum(even)
    for layer, count in zip(layers, counts, strict=True):
        assert layer.fewest <= count <= layer.experts
        assert (layer.experts - count) % layer.groups == 0


def test_levels_are_a_fortieth_of_the_experts_apart_at_most():
    assert ExpertGrid.around([ExpertLayer(8, 2)] * 2, [2, 2]).kept == (tuple(range(2, 9)),) * 2
    assert ExpertGrid.around([LAYER] * 2, [16, 16]).kept[0] == tuple(range(8, 65))
    assert ExpertGrid.around([ExpertLayer(128, 8)] * 2, [32, 32]).kept[0] == tuple(range(9, 129, 3))
    # Steps of 8, as many of each group; its routers need 16.
    assert ExpertGrid.around([GROUPED] * 2, [64, 64]).kept[0] == tuple(range(16, 257, 8))


def test_one_layer_has_nothing_to_choose():
    with pytest.raises(
        UsageError, match="1 decoder block has experts to choose among, so there is nothing to allocate"
    ):
        ExpertGrid.around([LAYER, ExpertLayer(8, 8)], [16, 0])
