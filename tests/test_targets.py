import pytest
import torch

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers.targets import find_decoder_blocks, resolve_targets


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = torch.nn.Linear(4, 4)
        self.up_proj = torch.nn.Linear(4, 8)
        self.norm = torch.nn.LayerNorm(4)


class Model(torch.nn.Module):
    """Two blocks, and a head whose name ends like one of a block's Linears, as in LLaDA."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(10, 4)
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.up_proj = torch.nn.Linear(4, 10)


def names(model, targets, ignore=()):
    return [target.name for target in resolve_targets(model, list(targets), list(ignore))[0]]


BLOCK_LINEARS = ["blocks.0.q_proj", "blocks.0.up_proj", "blocks.1.q_proj", "blocks.1.up_proj"]


def test_class_names_reach_into_blocks_only():
    assert names(Model(), ["Linear"]) == BLOCK_LINEARS


def test_the_head_is_pruned_only_when_named():
    assert names(Model(), ["Linear", "up_proj"]) == [*BLOCK_LINEARS, "up_proj"]
    assert names(Model(), [r"re:^up_proj$"]) == ["up_proj"]


def test_blocks_stand_for_their_linears():
    assert names(Model(), ["Block"]) == BLOCK_LINEARS
    assert names(Model(), ["blocks.1"]) == BLOCK_LINEARS[2:]


@pytest.mark.parametrize(
    ("ignore", "left"),
    [
        (["blocks.0.q_proj"], BLOCK_LINEARS[1:]),
        (["re:.*q_proj"], ["blocks.0.up_proj", "blocks.1.up_proj"]),
        (["blocks.0"], BLOCK_LINEARS[2:]),
        (["up_proj"], BLOCK_LINEARS),
    ],
)
def test_ignore_ignores(ignore, left):
    assert names(Model(), ["Linear"], ignore) == left


def test_block_indices():
    targets, blocks = resolve_targets(Model(), ["Linear", "up_proj"], [])
    assert [target.block for target in targets] == [0, 0, 1, 1, None]
    assert len(blocks) == 2


def test_nothing_matched_is_an_error():
    with pytest.raises(UsageError, match=r"\['Conv1d'\].*select no Linear of Model.*Linear"):
        names(Model(), ["Conv1d"])
    with pytest.raises(UsageError, match="select no Linear"):
        names(Model(), ["Linear"], ["Linear"])


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UsageError, match="no list of decoder blocks"):
        find_decoder_blocks(torch.nn.Linear(2, 2))
