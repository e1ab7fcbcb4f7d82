"""The table of latencies on a machine that others use too."""

import random

import pytest
import torch
from nemotron_labs_checkpoints import write_nemotron_labs
from official_checkpoints import write_llada
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sinkprune_plugin.loading import load_model
from sinkprune_plugin.models.block_sizes import block_sizes
from sinkprune_plugin.models.decoder_blocks import find_decoder_blocks
from sinkprune_plugin.models.sizes_in_config import BlockSizes
from sinkprune_plugin.modifiers import block_latency
from sinkprune_plugin.modifiers.block_latency import _table, time_blocks

DENSE, HALF = BlockSizes(512, 4, 4), BlockSizes(256, 4, 4)
# Attention is 4/10 of the dense block's weights.
WEIGHTS = {DENSE: 1000, HALF: 700}
TRUE = {DENSE: 1.0e-3, HALF: 0.75e-3, None: 0.5e-3}


def rounds(count, slow, seed=0):
    """Timings with jitter, and rounds in which another program takes the core."""
    generator = random.Random(seed)
    found = []
    for _ in range(count):
        load = 3.0 if generator.random() < slow else 1.0
        found.append({key: value * load * generator.gauss(1, 0.03) for key, value in TRUE.items()})
    return found


@pytest.mark.parametrize("slow", [0.0, 0.3, 0.6])
def test_slow_rounds_change_no_proportion(slow):
    table = _table(rounds(40, slow), WEIGHTS)
    # 3 % jitter of each timing, 40 rounds: the median is known to 0.6 %.
    assert table.blocks[HALF] / table.blocks[DENSE] == pytest.approx(0.75, rel=0.03)
    assert table.rest / table.blocks[DENSE] == pytest.approx(0.5, rel=0.03)


def test_no_block_saves_more_than_its_share_of_the_operations():
    lucky = [{key: value * (0.4 if key == HALF else 1) for key, value in each.items()} for each in rounds(9, 0.0)]
    table = _table(lucky, WEIGHTS)
    assert table.blocks[HALF] == pytest.approx(0.7 * table.blocks[DENSE])


class _Shapes(TorchFunctionMode):
    """Lengths of queries and keys of every attention."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key = (*args, *(kwargs[name] for name in ("query", "key") if name in kwargs))[:2]
            self.seen.add((query.shape[2], key.shape[2]))
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    ("write", "lengths"), [(write_llada, (24, 24)), (write_nemotron_labs, (4, 24))], ids=["all tokens", "an open block"]
)
def test_what_is_timed_is_what_a_step_computes(write, lengths, tmp_path, monkeypatch):
    monkeypatch.setattr(block_latency, "SECONDS", 0.0)
    config, _ = write(tmp_path)
    assert config.get("block_size", 4) == 4
    model = load_model(tmp_path, torch.float32)
    sizes = block_sizes(model)
    with _Shapes() as shapes:
        table = time_blocks(model, find_decoder_blocks(model)[1], set(sizes), 2, 24)
    assert shapes.seen == {lengths}
    assert table.blocks.keys() == set(sizes)
    assert all(seconds > 0 for seconds in (*table.blocks.values(), table.rest))
