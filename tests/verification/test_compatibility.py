"""Which weights structured pruning may remove, and which differences are another model's."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.inspection.info import inspect_checkpoint
from sinkprune_plugin.verification.compatibility import check_derived, natural_zeros


def tensors(blocks=3, channels=8, width=4, vocabulary=6):
    found = {"model.wte.weight": torch.ones(vocabulary, width)}
    for block in range(blocks):
        found[f"model.blocks.{block}.up_proj.weight"] = torch.ones(channels, width)
        found[f"model.blocks.{block}.ff_out.weight"] = torch.ones(width, channels)
    return found


def write(folder, content):
    folder.mkdir()
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llada"}))
    return folder


def without(name):
    return {key: value for key, value in tensors().items() if key != name}


@pytest.mark.parametrize("pruned", [tensors(), tensors(channels=5), tensors(blocks=2), tensors(1, 5)])
def test_what_pruning_removes(pruned, tmp_path):
    check_derived(write(tmp_path / "dense", tensors()), write(tmp_path / "pruned", pruned))


@pytest.mark.parametrize(
    ("pruned", "message"),
    [
        (tensors(channels=9), "ff_out.weight is [4, 8]"),
        (tensors(width=3), "model.wte.weight is [6, 4]"),
        (tensors(vocabulary=5), "model.wte.weight is [6, 4]"),
        (tensors() | {"model.blocks.1.up_proj.weight": torch.ones(5, 3)}, "blocks.1.up_proj.weight is [8, 4]"),
        (tensors() | {"model.blocks.1.up_proj.weight": torch.ones(5)}, "blocks.1.up_proj.weight is [8, 4]"),
        (without("model.blocks.1.up_proj.weight"), "has no model.blocks.1.up_proj.weight"),
        (without("model.wte.weight"), "has no model.wte.weight"),
        ({"x.weight": torch.ones(1)}, "no layer in common"),
    ],
)
def test_what_makes_another_model(pruned, message, tmp_path):
    with pytest.raises(UsageError, match=re.escape(message)):
        check_derived(write(tmp_path / "dense", tensors()), write(tmp_path / "pruned", pruned))


def test_zeros_are_compared_where_positions_correspond(tmp_path):
    content = tensors()
    for block in range(2):
        content[f"model.blocks.{block}.up_proj.weight"][0] = 0
    dense = write(tmp_path / "dense", content)
    smaller = content | {"model.blocks.0.up_proj.weight": content["model.blocks.0.up_proj.weight"][:5].clone()}
    cases = {"same": (content, 8), "smaller": (smaller, 4), "fewer": (dict(list(content.items())[:5]), None)}
    for name, (pruned, expected) in cases.items():
        folder = write(tmp_path / name, pruned)
        assert natural_zeros(dense, folder, inspect_checkpoint(folder).layers).get("up_proj") == expected, name
