import pytest
import torch

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.pruning.units import UnitGroup, level_widths


def channels(total=512, granularity=8):
    return UnitGroup("mlp_channels", "channels", total, 1, 1, granularity)


def heads(total=28, together=7, granularity=1):
    return UnitGroup("attention_heads", "attention heads", total, together, 128, granularity)


@pytest.mark.parametrize(
    ("amount", "kept"),
    [(0, 512), (0.0, 512), (0.5, 256), (0.3, 360), (128, 384), (504, 8), (0.98, 8)],
)
def test_what_stays_is_a_multiple(amount, kept):
    assert channels().kept(amount) == kept


@pytest.mark.parametrize(("amount", "kept"), [(0.5, 14), (7, 21), (0.3, 21), (0.4, 14)])
def test_query_heads_go_in_the_groups_that_share_a_key_and_value_head(amount, kept):
    assert heads().kept(amount) == kept


def test_a_width_that_is_no_multiple_itself_may_stay_whole():
    assert channels(500, 64).kept(0) == 500
    assert channels(500, 64).kept(0.3) == 320


@pytest.mark.parametrize("amount", [1.0, 1.5, -0.1, -1, float("nan"), float("inf"), True])
def test_amounts_out_of_range(amount):
    with pytest.raises(UsageError, match=r"mlp_channels .* neither a share to remove in \[0, 1\) nor a whole number"):
        channels().kept(amount)


@pytest.mark.parametrize(
    ("group", "amount", "message"),
    [
        (channels(), 100, r"mlp_channels 100 leaves 412 of 512 channels, .*multiple of 8 .*can stay: 408 and 416;"),
        (channels(granularity=64), 0.01, r"leaves 506.88 of 512 .*\(granularity 64\); the nearest that can stay: 448;"),
        (channels(), 512, r"leaves 0 of 512 channels.*the nearest that can stay: 8;"),
        (channels(), 0.999, r"leaves 0.512 of 512 channels.*the nearest that can stay: 8;"),
        (channels(48, 64), 0.5, r"leaves 24 of 48 channels.*the nearest that can stay: 48;"),
        (heads(), 3, r"leaves 25 of 28 attention heads.*in groups of 7 that share a key and value head.*stay: 21;"),
        (heads(), 10, r"the nearest that can stay: 14 and 21;"),
    ],
)
def test_what_cannot_stay_names_the_nearest_widths(group, amount, message):
    with pytest.raises(UsageError, match=message):
        group.kept(amount)


def test_columns_and_members_of_units():
    units = torch.tensor([0, 2])
    group = UnitGroup("attention_heads", "attention heads", 6, 2, 3, 1)
    assert group.units == 3
    assert group.members(units).tolist() == [0, 1, 4, 5]
    assert group.columns(units).tolist() == [*range(6), *range(12, 18)]
    assert channels().columns(units).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("group", "number", "widths"),
    [
        (channels(64, 8), 99, [8, 16, 24, 32, 40, 48, 56, 64]),
        (channels(64, 8), 5, [16, 32, 48, 64]),
        (heads(6, 1), 10, [1, 2, 3, 4, 5, 6]),
        (heads(), 10, [7, 14, 21, 28]),
        (channels(48, 64), 5, [48]),
    ],
)
def test_levels_are_evenly_spaced_multiples(group, number, widths):
    assert level_widths(group, number) == widths
