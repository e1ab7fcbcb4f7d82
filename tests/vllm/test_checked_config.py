"""Which numbers of ranks decoder blocks can be shared by."""

import pytest

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.llada.configuration_llada import LLaDAConfig
from sinkprune_plugin.vllm.checked_config import check_shares

WHOLE = {"mlp_channels": 96, "attention_heads": 8, "key_value_heads": 4}


def config(**last):
    sizes = [WHOLE, WHOLE | last]
    return LLaDAConfig(
        d_model=64, n_heads=8, n_kv_heads=4, head_dim=8, mlp_hidden_size=96, n_layers=2, sinkprune_block_sizes=sizes
    )


@pytest.mark.parametrize(
    ("last", "ranks"),
    [({}, 1), ({}, 4), ({}, 8), ({"mlp_channels": 40}, 8), ({"attention_heads": 4, "key_value_heads": 2}, 4),
     ({"mlp_channels": 95, "attention_heads": 3, "key_value_heads": 3}, 1)],
)  # fmt: skip
def test_shares_of_one_size(last, ranks):
    check_shares(config(**last), ranks)


@pytest.mark.parametrize(
    ("last", "ranks", "message"),
    [({"mlp_channels": 44}, 8, "decoder block 1 has 44 MLP channels, which can't be shared by tensor_parallel_size=8; "
      "use 1 or 2 or 4"),
     ({"attention_heads": 6, "key_value_heads": 2}, 4, "decoder block 1 has 6 attention heads, .*; use 1 or 2"),
     ({"attention_heads": 6, "key_value_heads": 3}, 2, "decoder block 1 has 3 key and value heads, .*; use 1"),
     ({}, 16, "decoder block 0 has 8 attention heads, .*; use 1 or 2 or 4 or 8")],
)  # fmt: skip
def test_shares_of_different_sizes_are_refused(last, ranks, message):
    with pytest.raises(UsageError, match=f"^{message}$"):
        check_shares(config(**last), ranks)
