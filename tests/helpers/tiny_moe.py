"""A language model with experts, in a second: the embedded model, its MLPs dealt to experts and not trained further."""

import torch
from torch import nn
from train_tiny_llada_moe import Settings, upcycle

from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.text_windows import embedded_text, read_documents, token_windows

__all__ = ["keep_first_experts", "write_tiny_moe"]


def write_tiny_moe(folder, experts=None, **settings):
    """Write model and tokenizer; ``experts`` gives each of the six layers a number of its own, of the first of 8."""
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    windows = token_windows(read_documents(embedded_text("calibration")), tokenizer, 128, 4)
    model = upcycle(load_model(EMBEDDED_MODEL, torch.float32), windows, Settings(**settings))
    if experts is not None:
        keep_first_experts(model, experts)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def keep_first_experts(model, experts):
    """Drop the other experts of each layer, in place; what pruning does, in the plainest way."""
    sizes = [size.to_json() for size in model.config.ordinary_block_sizes()]
    for layer, count in zip(model.model.layers, experts, strict=True):
        layer.mlp.experts = layer.mlp.experts[:count]
        layer.mlp.gate.weight = nn.Parameter(layer.mlp.gate.weight[:count].detach().clone())
    model.config.sinkprune_block_sizes = [
        {**size, "experts": count} for size, count in zip(sizes, experts, strict=True)
    ]
