"""Checkpoints that are quantized and sparse."""

import pytest
import torch
from checkpoint_files import config_of
from checkpoint_maker import CONFIG, TARGETS, assert_same, model, two_of_four, unstructured, write_dense

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import (
    convert_checkpoint,
    load_sparse_checkpoint,
    save_sparse_checkpoint,
)

QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"]}},
    "quantization_status": "compressed",
    "version": "0.19.0",
}


def quantized(weight, dtype):
    tensors = {}
    for name, tensor in model(lambda rows, columns: weight(rows, columns, dtype=dtype)).items():
        tensors[name] = tensor
        if name in TARGETS:
            tensors[f"{name}_scale"] = torch.rand(tensor.shape[0], 1).bfloat16()
    return tensors


@pytest.mark.parametrize("requested", ["auto", "sparse-24-bitmask"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_2_of_4(tmp_path, dtype, requested):
    tensors = quantized(two_of_four, dtype)
    source = write_dense(tmp_path / "source", tensors, config=CONFIG | {"quantization_config": QUANTIZATION})
    written = convert_checkpoint(source, tmp_path / "sparse", requested)
    assert written.format == "sparse-24-bitmask"
    assert written.targets == tuple(TARGETS)
    assert_same(load_sparse_checkpoint(tmp_path / "sparse"), tensors)
    block = config_of(tmp_path / "sparse")["quantization_config"]
    assert block.items() >= {**QUANTIZATION, "quant_method": "compressed-tensors-sparse"}.items()
    convert_checkpoint(tmp_path / "sparse", tmp_path / "dense", "dense")
    assert config_of(tmp_path / "dense") == config_of(source)


@pytest.mark.parametrize("requested", ["auto", "sparse-24-bitmask"])
def test_quantized_but_not_2_of_4_stays_dense_and_says_so(tmp_path, requested):
    tensors = quantized(lambda rows, columns, dtype: unstructured(rows, columns, 0.6, dtype), torch.int8)
    config = CONFIG | {"quantization_config": QUANTIZATION}
    written = save_sparse_checkpoint(tensors, tmp_path / "a", format=requested, config=config)
    assert written.format == "dense"
    assert written.notes == (f"{TARGETS[0]} and 5 more: pruned and quantized but not 2:4, stored dense",)
    assert config_of(tmp_path / "a") == config
    assert_same(load_sparse_checkpoint(tmp_path / "a"), tensors)
    # One that is 2:4 is stored so, the others stay dense.
    mixed = tensors | {TARGETS[0]: two_of_four(32, 48, torch.int8)}
    written = save_sparse_checkpoint(mixed, tmp_path / "b", format=requested, config=config)
    assert (written.format, written.targets) == ("sparse-24-bitmask", (TARGETS[0],))
    assert "4 more" in written.notes[0]
    assert_same(load_sparse_checkpoint(tmp_path / "b"), mixed)


def test_unpruned_quantized_weights_have_zeros_too(tmp_path):
    tensors = quantized(lambda rows, columns, dtype: unstructured(rows, columns, 0.2, dtype), torch.int8)
    config = CONFIG | {"quantization_config": QUANTIZATION}
    written = save_sparse_checkpoint(tensors, tmp_path / "a", format="auto", config=config)
    assert written.notes == ("no weight under the quantization is pruned; the checkpoint has no sparse weights",)


def test_another_tools_quantization_is_refused(tmp_path):
    config = CONFIG | {"quantization_config": {"quant_method": "gptq"}}
    with pytest.raises(UsageError, match="quantization_config of 'gptq'"):
        save_sparse_checkpoint(model(), tmp_path / "a", config=config)
    save_sparse_checkpoint(model(), tmp_path / "a", format="dense", config=config)
    assert config_of(tmp_path / "a") == config
