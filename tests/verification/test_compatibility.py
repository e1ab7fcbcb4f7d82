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


def mixture(experts=(4, 3), channels=8, width=4):
    """Blocks with so many experts each, numbered from 0."""
    found = {"model.embed_tokens.weight": torch.ones(6, width)}
    for block, count in enumerate(experts):
        found[f"model.layers.{block}.mlp.gate.weight"] = torch.ones(count, width)
        for expert in range(count):
            # Its number among the experts of all blocks is in the weight's first row, with a zero for each.
            weight = torch.ones(channels, width)
            weight.view(-1)[: 1 + expert + 10 * block] = 0
            found[f"model.layers.{block}.mlp.experts.{expert}.up_proj.weight"] = weight
    return found


def write(folder, content, **config):
    folder.mkdir()
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llada", **config}))
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


@pytest.mark.parametrize("experts", [(4, 3), (2, 3), (3, 1), (4,)])
def test_experts_are_removed_and_those_that_stay_are_numbered_anew(experts, tmp_path):
    check_derived(write(tmp_path / "dense", mixture()), write(tmp_path / "pruned", mixture(experts)))


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        # Part of an expert, a whole list, and what isn't an expert.
        ("layers.0.mlp.experts.1.up_proj.weight", None),
        ("layers.1.mlp.experts.", "has no model.layers.1.mlp.experts.0.up_proj.weight"),
        ("layers.1.mlp.gate.weight", "has no model.layers.1.mlp.gate.weight"),
    ],
)
def test_experts_of_another_model(gone, message, tmp_path):
    pruned = {name: value for name, value in mixture().items() if gone not in name}
    if message is None:
        pruned["model.layers.0.mlp.experts.1.down_proj.weight"] = torch.ones(4, 8)
        message = f"has no model.{gone}"
    with pytest.raises(UsageError, match=re.escape(message)):
        check_derived(write(tmp_path / "dense", mixture()), write(tmp_path / "pruned", pruned))


def test_zeros_of_experts_are_compared_with_those_they_were(tmp_path):
    """Experts 1 and 3 of the first block stay, and 2 of the second; the dense model had lost one itself."""
    weights = mixture((4, 3))
    name = "model.layers.{}.mlp.experts.{}.up_proj.weight"
    pruned = mixture((2, 1)) | {
        name.format(0, 0): weights[name.format(0, 1)].clone(),
        name.format(0, 1): weights[name.format(0, 3)].clone(),
        name.format(1, 0): weights[name.format(1, 2)].clone(),
    }
    for case, (dense_kept, pruned_kept, expected) in {
        "first": (None, [[1, 3], [2]], 2 + 4 + 13),
        # The same experts, by the numbers of a model before the dense one.
        "second": ([[0, 2, 4, 5], [0, 1, 7]], [[2, 5], [7]], 2 + 4 + 13),
        # Without numbers each is compared with the one in its place.
        "none": (None, None, 1 + 2 + 11),
        "damaged": (None, [[1]], 2),
    }.items():
        notes = [{} if kept is None else {"sinkprune_kept_experts": kept} for kept in (dense_kept, pruned_kept)]
        dense = write(tmp_path / f"{case}-dense", weights, **notes[0])
        folder = write(tmp_path / f"{case}-pruned", pruned, **notes[1])
        assert natural_zeros(dense, folder, inspect_checkpoint(folder).layers).get("up_proj") == expected, case
