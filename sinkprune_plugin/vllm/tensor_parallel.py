"""Whether a model's decoder blocks can be split between tensor-parallel ranks."""

from typing import Any

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.sizes_in_config import sizes_in_config

__all__ = ["check_shares"]


def check_shares(config: Any, ranks: int) -> None:
    """Check that every block gives all ranks shares of one size, which vLLM's layers need.

    :param config: LLaDA's or Dream's configuration, checked
    :param ranks: ``tensor_parallel_size``
    :raises UsageError: naming the first block that doesn't, and the numbers of ranks that all blocks allow
    """
    sizes = sizes_in_config(config)
    allowed = [number for number in range(1, ranks + 1) if all(not _undivided(block, number) for block in sizes)]
    for index, block in enumerate(sizes):
        if what := _undivided(block, ranks):
            raise UsageError(
                f"decoder block {index} has {what}, which can't be shared by tensor_parallel_size={ranks}; use "
                f"{' or '.join(map(str, allowed))}"
            )


def _undivided(block: Any, ranks: int) -> str:
    if block.mlp_channels % ranks:
        return f"{block.mlp_channels} MLP channels"
    if block.attention_heads % ranks:
        return f"{block.attention_heads} attention heads"
    # Fewer than ranks are repeated on several of them.
    if block.key_value_heads % ranks and ranks % block.key_value_heads:
        return f"{block.key_value_heads} key and value heads"
    return ""
