"""The cells of README's support matrix that no other test backs: stock tools, without this package, on our checkpoints.

Each reader runs in a separate process in which torch doesn't autoload extensions, so this package isn't loaded.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sinkprune_plugin.formats import convert_checkpoint

README = Path(__file__).parent.parent / "README.md"
OUTPUTS = {
    "dense": ("dense", "sinkprune"),
    "sparse-bitmask": ("sparse-bitmask", "sinkprune"),
    "sparse-24-bitmask": ("sparse-24-bitmask", "sinkprune"),
    "legacy": ("sparse-24-bitmask", "legacy"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A Llama pruned to 2:4 in each format, so that stock classes exist for it."""
    folder = tmp_path_factory.mktemp("matrix")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=64,
        )
    )
    for name, weight in model.named_parameters():
        if re.search(r"\.\d+\..*proj", name):
            groups = weight.data.view(-1, 4)
            weight.data = groups.scatter(1, groups.abs().topk(2, largest=False).indices, 0).view(weight.shape)
    model.save_pretrained(folder / "source")
    for name, (to, layout) in OUTPUTS.items():
        convert_checkpoint(folder / "source", folder / name, to, layout=layout, progress=False)
    return folder


def without_us(script, *arguments):
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert not any(name.startswith("sinkprune_plugin") for name in sys.modules)
expected = load_file(sys.argv[2])
print("same" if all(torch.equal(model.state_dict()[name], expected[name]) for name in expected) else "other weights")
"""


def test_stock_transformers_loads_dense(checkpoints):
    done = without_us(LOAD, checkpoints / "dense", checkpoints / "source" / "model.safetensors")
    assert done.stdout.split("\n")[-2:] == ["same", ""], done.stderr[-1500:]


@pytest.mark.parametrize("output", ["sparse-bitmask", "sparse-24-bitmask"])
def test_stock_transformers_warns_of_the_key_and_makes_new_weights(output, checkpoints):
    """Not a clear refusal: transformers 5.17 skips a quantization it doesn't know."""
    done = without_us(LOAD, checkpoints / output, checkpoints / "source" / "model.safetensors")
    assert done.stdout.split("\n")[-2:] == ["other weights", ""], done.stderr[-1500:]
    assert "Unknown quantization type, got compressed-tensors-sparse" in done.stderr
    assert "MISSING" in done.stderr


def test_stock_transformers_fails_on_the_legacy_key(checkpoints):
    done = without_us(LOAD, checkpoints / "legacy", checkpoints / "source" / "model.safetensors")
    assert done.returncode != 0
    assert "'NoneType' object has no attribute 'config_groups'" in done.stderr


def test_plain_safetensors_readers_see_the_parts(checkpoints):
    """Any other tool sees ordinary tensors under other names: nothing that could be taken for the dense weight."""
    names = load_file(checkpoints / "sparse-24-bitmask" / "model.safetensors").keys()
    assert "model.layers.0.mlp.up_proj.weight" not in names
    assert "model.layers.0.mlp.up_proj.compressed" in names


def test_dense_output_has_no_trace_of_sparsity(checkpoints):
    config = json.loads((checkpoints / "dense" / "config.json").read_text())
    assert "quantization_config" not in config


def test_readme_has_a_row_for_every_output():
    rows = [line.split("|")[1].strip(" `") for line in README.read_text(encoding="utf-8").splitlines() if "|" in line]
    for output in ("dense", "sparse-bitmask", "sparse-24-bitmask", "--layout legacy"):
        assert any(output in row for row in rows), output
