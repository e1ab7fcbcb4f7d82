"""compressed-tensors' note of removed experts: ``ExpertSparsityConfig`` of its release 0.20.

It is a key of the ``quantization_config``, so it has a place only in a checkpoint that is quantized or stored sparse.
No reader uses it so far; releases before 0.20 ignore it.
"""

from collections.abc import Mapping
from typing import Any

from sinkprune_plugin.formats.codecs.format_names import LEGACY_METHOD, QUANT_METHOD
from sinkprune_plugin.models.sizes_in_config import KEPT_KEY

__all__ = ["EXPERT_SPARSITY", "with_expert_sparsity"]

EXPERT_SPARSITY = "moe_sparsity_config"
"""Its name in the ``quantization_config``."""


def with_expert_sparsity(config: Mapping[str, Any], *, legacy: bool) -> dict[str, Any]:
    """Say how many experts each decoder block has kept, where there is a place for it.

    :param config: content of config.json; ``sinkprune_kept_experts`` tells whether experts were removed
    :param legacy: written in layout ``legacy``, whose readers take any key that they don't know for a quantization
    :return: the new content
    """
    kept, block = config.get(KEPT_KEY), config.get("quantization_config")
    if legacy or not isinstance(kept, list) or not isinstance(block, dict):
        return dict(config)
    if block.get("quant_method") not in (QUANT_METHOD, LEGACY_METHOD):
        return dict(config)
    # None for a block without experts, as compressed-tensors has it.
    counts = [len(numbers) or None for numbers in kept]
    note = {"method": "prune", "num_experts": counts}
    return {**config, "quantization_config": {**block, EXPERT_SPARSITY: note}}
