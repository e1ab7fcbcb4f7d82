"""The table of latencies on a machine that others use too."""

import random

import pytest

from sinkprune_plugin.models.sizes_in_config import BlockSizes
from sinkprune_plugin.modifiers.block_latency import _table

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
