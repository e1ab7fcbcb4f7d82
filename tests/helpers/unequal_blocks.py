"""Models whose decoder blocks differ in their numbers of channels, heads, and key and value heads."""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from official_checkpoints import write_dream, write_llada
from safetensors.torch import load_file

from sinkprune_plugin.loading import load_model
from sinkprune_plugin.models.block_sizes import block_sizes, keep_units

__all__ = ["make_unequal", "write_unequal_dream", "write_unequal_llada"]

# One block each, in turn; the third stays whole. Query heads in whole groups, so that they fit any model.
_KEPT = ((0.5, 1.0), (0.75, 0.34), (1.0, 1.0), (0.25, 0.67))


def make_unequal(model, *, multiple=8):
    """Remove the last units of each block in place, other numbers of them in each; channels in multiples of 8."""
    for number, sizes in enumerate(block_sizes(model)):
        channels, groups = _KEPT[number % len(_KEPT)]
        share = sizes.attention_heads // sizes.key_value_heads
        keep_units(
            model,
            number,
            channels=torch.arange(max(1, int(channels * sizes.mlp_channels / multiple)) * multiple),
            heads=torch.arange(max(1, round(groups * sizes.key_value_heads)) * share),
        )
    return model


def _write_unequal(write, folder, **changes):
    folder = Path(folder)
    with tempfile.TemporaryDirectory() as dense:
        write(dense, **changes)
        make_unequal(load_model(dense)).save_pretrained(folder)
        for file in Path(dense).glob("*.py"):
            shutil.copy(file, folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def write_unequal_llada(folder, **changes):
    """As :func:`write_llada`: the checkpoint, its configuration and its tensors."""
    return _write_unequal(write_llada, folder, **changes)


def write_unequal_dream(folder, **changes):
    """As :func:`write_dream`, with four key and value heads of two query heads each."""
    return _write_unequal(
        write_dream, folder, **{"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4} | changes
    )
