import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers.block_origins import find_origins


def block(seed, *, norms_differ=True, channels=12):
    torch.manual_seed(seed)
    made = nn.ModuleDict({"norm": nn.LayerNorm(8, bias=False), "up": nn.Linear(8, channels, bias=False)})
    if norms_differ:
        made["norm"].weight.data = 1 + 0.01 * torch.randn(8)
    return made


def weights(blocks):
    return {
        f"layers.{index}.{name}": each.data for index, one in enumerate(blocks) for name, each in one.named_parameters()
    }


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 7), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]), st.data())
def test_blocks_are_recognised_whichever_went(count, norms_differ, dtype, data):
    left = data.draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True).map(sorted))
    dense = [block(index, norms_differ=norms_differ) for index in range(count)]
    pruned = nn.ModuleList([block(index, norms_differ=norms_differ) for index in left]).to(dtype)
    for one in pruned:
        # Single weights that went, and others that were adapted.
        one["up"].weight.data[one["up"].weight.abs() < 0.1] = 0
        one["up"].weight.data *= 1.05
    assert find_origins("layers", pruned, weights(dense), count) == left


def test_channels_that_went_leave_the_norms():
    dense = [block(index) for index in range(5)]
    pruned = nn.ModuleList([block(index, channels=12) for index in (0, 3)])
    for one in pruned:
        one["up"].weight = nn.Parameter(one["up"].weight[::2])
    assert find_origins("layers", pruned, weights(dense), 5) == [0, 3]


def test_what_is_not_clear_is_said():
    dense = [block(0, norms_differ=False) for _ in range(3)]
    pruned = nn.ModuleList([block(0, norms_differ=False) for _ in range(2)])
    with pytest.raises(UsageError, match=r"has 2 of the dense model's 3 .* block 1 may be block . or ."):
        find_origins("layers", pruned, weights(dense), 3)
    other = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 4)})])
    with pytest.raises(UsageError, match="none of their weights has kept its shape"):
        find_origins("layers", other, weights(dense), 3)
    with pytest.raises(UsageError, match="has 4 decoder blocks and the dense one 3"):
        find_origins("layers", nn.ModuleList([block(0) for _ in range(4)]), weights(dense), 3)
