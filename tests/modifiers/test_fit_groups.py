"""Groups of weights that are trained at once: whole experts, as many as fit."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sinkprune_plugin.modifiers.block_fit import state_bytes
from sinkprune_plugin.modifiers.fit_groups import TrainedWeight, fit_groups


def weight(name, expert, numel=100):
    return TrainedWeight(name, numel, torch.bfloat16, expert)


def names(groups):
    return [[each.name for each in group] for group in groups]


def test_what_is_not_an_experts_comes_first_and_does_not_count():
    # Bytes of an expert: 16 for float32 masters, gradient and moments, and three copies in bfloat16.
    assert weight("a", 0).state_bytes == 100 * (16 + 3 * 2) == state_bytes([100], torch.bfloat16)
    weights = [weight("q", None, 10**6), *(weight(f"{n}.{path}", n) for n in range(3) for path in "ud")]
    assert names(fit_groups(weights, 2 * 4400)) == [["q", "0.u", "0.d", "1.u", "1.d"], ["2.u", "2.d"]]
    assert names(fit_groups(weights, 2 * 4400 - 1)) == [["q", "0.u", "0.d"], ["1.u", "1.d"], ["2.u", "2.d"]]
    assert names(fit_groups(weights[:1], 1)) == [["q"]]
    # A single expert is trained however large it is.
    assert names(fit_groups(weights[1:3], 1)) == [["0.u", "0.d"]]
    assert fit_groups([], 1) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 50)), max_size=20), st.integers(1, 5000))
def test_every_weight_is_in_one_group_and_experts_are_whole(parts, limit):
    weights = [weight(str(place), number, numel) for place, (number, numel) in enumerate(parts)]
    groups = fit_groups(weights, limit)
    assert sorted(each.name for group in groups for each in group) == sorted(each.name for each in weights)
    owners = [{each.expert for each in group} for group in groups]
    assert sum(map(len, owners)) == len(set().union(*owners))
    for group, owner in zip(groups, owners, strict=True):
        assert len(owner) == 1 or sum(each.state_bytes for each in group) <= limit
