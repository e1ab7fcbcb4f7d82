"""Low-rank adapters whose product is masked by the zeros of the weight that it adds to.

With plain LoRA the sum of a pruned weight and its adapters is dense. Here the adapters' product counts only where the
weight isn't zero, in training as in the merged result, so that merging changes nothing (the idea is that of PERP,
arXiv 2312.15230). The product is made in each forward pass; with gradient checkpointing one block's products exist at a
time.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora

from sinkprune_plugin.models.decoder_blocks import block_linears

__all__ = ["add_adapters", "merge_adapters"]


class MaskedLoraLinear(lora.Linear):
    """peft's adapter of a Linear, with W + M ⊙ (s B A) in place of W + s B A, M being 1 where W isn't 0."""

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What the adapter adds to the weight; also what peft merges.

        :param adapter: its name
        :return: (rows, columns), 0 where the weight is 0
        """
        return super().get_delta_weight(adapter) * (self.get_base_layer().weight != 0)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """See the base class.

        :param x: (…, columns)
        :return: (…, rows)
        """
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        weight = base.weight
        for adapter in self.active_adapters:
            weight = weight + self.get_delta_weight(adapter).to(weight.dtype)
        return F.linear(x, weight, base.bias)


def add_adapters(model: Any, rank: int, seed: int) -> PeftModel:
    """Give every Linear of the decoder blocks an adapter, the only thing that is then trained.

    :param model: pruned model
    :param rank: rank of the adapters; their scale is 1
    :param seed: seed of their initial values
    :return: the model with float32 adapters
    """
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(block_linears(model)))
    # peft's way to have its own layers replaced; it notes that such a config isn't saved, and ours is made anew.
    config._register_custom_module({torch.nn.Linear: MaskedLoraLinear})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    return adapted


def merge_adapters(model: PeftModel) -> Any:
    """Add the adapters to the weights.

    :param model: what :func:`add_adapters` made
    :return: the model without adapters
    """
    return model.merge_and_unload()
