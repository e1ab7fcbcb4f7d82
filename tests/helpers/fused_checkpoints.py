"""Checkpoints whose experts are fused, made from those with a tensor for each weight, as tools do that fuse them."""

import json
import re

import torch
from safetensors.torch import load_file, save_file

__all__ = ["LAYOUTS", "fuse"]

# Name of the fused tensor within the layer of experts → the projections whose rows it holds.
LAYOUTS = {
    "transformers": {"experts.gate_up_proj": ("gate_proj", "up_proj"), "experts.down_proj": ("down_proj",)},
    "dFactory": {f"experts.{name}": (name,) for name in ("gate_proj", "up_proj", "down_proj")},
    "dInfer": {"w1": ("gate_proj", "up_proj"), "w2": ("down_proj",)},
}


def fuse(folder, layout, **changes):
    """Fuse the experts of a checkpoint in place; ``changes`` are keys of config.json."""
    tensors = load_file(folder / "model.safetensors")
    experts = {}
    for name in list(tensors):
        if match := re.fullmatch(r"(.*\.mlp)\.experts\.(\d+)\.(\w+)\.weight", name):
            experts.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = tensors.pop(name)
    for layer, each in experts.items():
        for name, projections in LAYOUTS[layout].items():
            rows = [torch.cat([each[n][projection] for projection in projections]) for n in sorted(each)]
            tensors[f"{layer}.{name}"] = torch.stack(rows)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return tensors
