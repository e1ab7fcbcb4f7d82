"""Models whose decoder blocks differ in size, through the tools: offloaded, sparse, quantized, converted, described."""

import json
import shutil

import pytest
import torch
from command_line import run_here
from compressed_tensors.offload import offload_module
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from sparse_models import prune_2_of_4
from unequal_blocks import make_unequal, write_unequal_dream, write_unequal_llada

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import convert_checkpoint
from sinkprune_plugin.loading import load_model
from sinkprune_plugin.models.block_sizes import block_sizes, keep_units

WRITE = {"llada": write_unequal_llada, "dream": write_unequal_dream}
TOKENS = torch.arange(3, 31).view(2, 14)


@pytest.fixture(scope="module", params=WRITE)
def pruned(request, tmp_path_factory):
    """A dense checkpoint: blocks of different sizes, and 2:4 within them."""
    folder = tmp_path_factory.mktemp(request.param)
    WRITE[request.param](folder / "unequal")
    prune_2_of_4(load_model(folder / "unequal")).save_pretrained(folder / "dense")
    return folder / "dense"


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def test_sparse_formats(pruned, tmp_path):
    expected = logits(load_model(pruned))
    for number, (to, layout) in enumerate([("sparse-bitmask", "legacy"), ("sparse-24-bitmask", "sinkprune")]):
        sparse, dense = tmp_path / f"sparse-{number}", tmp_path / f"dense-{number}"
        done = run_here("convert", pruned, "--to", to, "--layout", layout, "--output", sparse)
        assert done.returncode == 0, done.stderr
        assert torch.equal(logits(load_model(sparse)), expected)
        assert run_here("convert", sparse, "--to", "dense", "--output", dense).returncode == 0
        for name in ("config.json", "model.safetensors"):
            assert (dense / name).read_bytes() == (pruned / name).read_bytes(), name


def test_quantized_by_oneshot_and_then_sparse(pruned, tmp_path):
    model = load_model(pruned)
    scheme = QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["re:.*ff_out$", "lm_head"])
    oneshot(model=model, recipe=[scheme], output_dir=str(tmp_path / "quantized"))
    expected = logits(model)
    again = load_model(tmp_path / "quantized")
    assert block_sizes(again) == block_sizes(model)
    # Loaded, the weights are dequantized before the product; in oneshot they are rounded in place.
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    convert_checkpoint(tmp_path / "quantized", tmp_path / "sparse", "sparse-24-bitmask")
    assert torch.equal(logits(load_model(tmp_path / "sparse")), logits(again))


def test_offloaded_weights(pruned):
    """Each Linear is offloaded by itself, as llm-compressor leaves a model that doesn't fit on its device."""
    offloaded, expected = load_model(pruned), load_model(pruned)
    for module in list(offloaded.modules()):
        if isinstance(module, torch.nn.Linear):
            offload_module(module, torch.device("cpu"), torch.device("cpu"))
    for model in (offloaded, expected):
        keep_units(model, 0, channels=torch.tensor([0, 2, 5, 7]), heads=torch.tensor([2, 3]))
    assert block_sizes(offloaded) == block_sizes(expected)
    assert torch.equal(logits(offloaded), logits(expected))


def test_info_and_a_config_of_other_sizes(pruned, tmp_path):
    found = json.loads(run_here("info", pruned, "--json").stdout)
    model = load_model(pruned)
    assert found["block_sizes"] == [sizes.to_json() for sizes in block_sizes(model)]
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["unpruned_parameters"] == model.config.sinkprune_dense_parameters > found["parameters"]
    alone = next(entry for entry in found["readers"] if entry["reader"] == "transformers without this package")
    assert alone["loads"] == "no"
    table = run_here("info", pruned).stdout
    for sizes in block_sizes(model):
        row = [str(sizes.mlp_channels), str(sizes.attention_heads), str(sizes.key_value_heads)]
        assert any(line.split()[1:] == row for line in table.splitlines()), table
    assert f"{found['parameters'] / found['unpruned_parameters']:.4f} of the" in table

    wrong = tmp_path / "wrong"
    shutil.copytree(pruned, wrong)
    config = json.loads((wrong / "config.json").read_text())
    config["sinkprune_block_sizes"][1]["mlp_channels"] += 1
    largest = "mlp_hidden_size" if "mlp_hidden_size" in config else "intermediate_size"
    config[largest] += 1
    (wrong / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"can't load the model .*\.1\..* in its weights and .* by its config\.json"):
        load_model(wrong)
    del config["sinkprune_block_sizes"][1]
    (wrong / "config.json").write_text(json.dumps(config))
    done = run_here("info", wrong)
    assert done.returncode == 2
    assert "sinkprune_block_sizes has 1 entries for 2 decoder blocks" in done.stderr


def test_a_structured_model_is_made_smaller_once_more(pruned, tmp_path):
    model = make_unequal(load_model(pruned))
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert again.config.sinkprune_dense_parameters == load_model(pruned).config.sinkprune_dense_parameters
