"""Checkpoints that are quantized, and sparse as well, through transformers' from_pretrained."""

import json

import pytest
import torch
from safetensors.torch import load_file
from sparse_models import (
    assert_ordinary,
    assert_same,
    edit_config,
    llama_model,
    quantization_config,
    sparsify,
    write_shards,
)
from transformers import (
    AutoModelForCausalLM,
)


@pytest.fixture(scope="module")
def llama():
    return llama_model()


def _quantized(model, directory, scheme):
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model.save_pretrained(directory / "source")
    source = AutoModelForCausalLM.from_pretrained(directory / "source", dtype="auto")
    recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
    oneshot(model=source, recipe=recipe)
    source.save_pretrained(directory / "quantized", save_compressed=True)
    return directory / "quantized"


def _as_stock(directory, monkeypatch, **options):
    """Load as transformers does without this package."""
    from transformers import CompressedTensorsConfig
    from transformers.quantizers import auto

    with monkeypatch.context() as patch:
        patch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "compressed-tensors", CompressedTensorsConfig)
        return AutoModelForCausalLM.from_pretrained(directory, dtype="auto", **options)


def _assert_same_quantized(loaded, stock):
    assert type(loaded.hf_quantizer.quantization_config).__name__ == "CompressedTensorsConfig"
    assert json.dumps(loaded.config.to_dict(), default=str) == json.dumps(stock.config.to_dict(), default=str)
    assert_same(loaded, stock)
    tokens = torch.arange(8).view(1, 8)
    with torch.no_grad():
        # The same numbers through the same code: no tolerance.
        assert torch.equal(loaded(tokens).logits, stock(tokens).logits)


@pytest.mark.parametrize("dense_sparsity", [False, True])
def test_stock_quantized_checkpoint_is_left_to_transformers(llama, tmp_path, monkeypatch, dense_sparsity):
    directory = _quantized(llama, tmp_path, "FP8_DYNAMIC")
    if dense_sparsity:
        config = json.loads((directory / "config.json").read_text())["quantization_config"]
        edit_config(directory, quantization_config={**config, "sparsity_config": {"format": "dense"}})
    stock = _as_stock(directory, monkeypatch)
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    assert type(loaded.hf_quantizer) is type(stock.hf_quantizer)
    assert type(loaded.hf_quantizer.quantization_config) is type(stock.hf_quantizer.quantization_config)
    _assert_same_quantized(loaded, stock)


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W8A8"])
@pytest.mark.parametrize("method", ["compressed-tensors-sparse", "compressed-tensors"])
def test_quantized_and_sparse(llama, tmp_path, monkeypatch, scheme, method):
    directory = _quantized(llama, tmp_path, scheme)
    stock = _as_stock(directory, monkeypatch)
    dequantized = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", quantization_config=type(stock.hf_quantizer.quantization_config)(dequantize=True)
    )
    tensors = load_file(directory / "model.safetensors")
    stored = sparsify(tensors, "sparse-24-bitmask")
    assert stored["model.layers.0.mlp.up_proj.compressed"].dtype.itemsize == 1
    (directory / "model.safetensors").unlink()
    write_shards(directory, stored, 3)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    edit_config(directory, quantization_config=config | quantization_config("sparse-24-bitmask", method))
    _assert_same_quantized(AutoModelForCausalLM.from_pretrained(directory, dtype="auto"), stock)

    options = {"quantization_config": type(stock.hf_quantizer.quantization_config)(dequantize=True)}
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", **options)
    assert_same(loaded, dequantized)
    assert_ordinary(loaded)
