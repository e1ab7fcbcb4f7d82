"""Checks of a model's configuration: that the modules compute what it says, and that ranks can share its blocks."""

import copy
from typing import Any

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.sizes_in_config import sizes_in_config

__all__ = ["check_config", "check_shares"]


def check_config(vllm_config: Any) -> Any:
    """Check that the modules compute what a model's configuration says.

    :param vllm_config: configuration of the engine
    :return: the model's configuration, ours, as vLLM has changed it
    :raises UsageError: naming the option that they don't compute
    """
    config = vllm_config.model_config.hf_config
    checked = copy.copy(config)
    # vLLM writes the rotary frequencies into every configuration a second time; type default adds nothing to those
    # that have them in a field of their own.
    own = hasattr(checked, "rope_theta")
    if own and (getattr(checked, "rope_parameters", None) or {}).get("rope_type") == "default":
        checked.rope_parameters = None
    checked.check_supported()
    check_shares(checked, vllm_config.parallel_config.tensor_parallel_size)
    return config


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
    if block.shared_channels % ranks:
        return f"{block.shared_channels} channels of the shared expert"
    if block.attention_heads % ranks:
        return f"{block.attention_heads} attention heads"
    # Fewer than ranks are repeated on several of them.
    if block.key_value_heads % ranks and ranks % block.key_value_heads:
        return f"{block.key_value_heads} key and value heads"
    return ""
