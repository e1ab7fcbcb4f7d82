"""Which configurations are a sparse checkpoint's, and what vLLM makes of them."""

import json
import sys

import pytest
from sparse_parts import TWO_OF_FOUR

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.vllm.sparse_weights import sparsity_of


class Config:
    def __init__(self, **blocks):
        self.__dict__.update(blocks)


def format_of(config):
    found = sparsity_of(config)
    return None if found is None else found.format


def test_format_of_a_configuration():
    sparsity = {"format": "sparse-24-bitmask", "targets": ["Linear"]}
    ours = {"quant_method": "compressed-tensors-sparse", "sparsity_config": sparsity}
    legacy = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    assert format_of(Config(quantization_config=ours)) is TWO_OF_FOUR
    assert format_of(Config(quantization_config=legacy)) is TWO_OF_FOUR
    assert format_of(Config(compression_config={"sparsity_config": sparsity})) is TWO_OF_FOUR
    # As vLLM leaves it behind.
    empty = {"quant_method": "", "sparsity_config": sparsity}
    assert format_of(Config(compression_config=empty)) is TWO_OF_FOUR
    assert format_of(Config(text_config=Config(quantization_config=legacy))) is TWO_OF_FOUR
    assert format_of(Config(quantization_config={"quant_method": "gptq", "bits": 4})) is None
    assert format_of(Config(quantization_config=None)) is None
    assert format_of(Config()) is None


@pytest.mark.parametrize("name", ["{module}:Thing", "sparse_bitmask", None, 7, ["sparse-bitmask"]])
def test_hostile_format_is_never_imported(name, tmp_path, monkeypatch):
    module = "a_hostile_module"
    (tmp_path / f"{module}.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    name = name.format(module=module) if isinstance(name, str) else name
    block = {"quant_method": "compressed-tensors-sparse", "sparsity_config": {"format": name}}
    with pytest.raises(UsageError, match=r"sparsity_config\.format"):
        format_of(Config(quantization_config=block))
    config_class = sparse_config_class()
    with pytest.raises(UsageError, match=r"sparsity_config\.format"):
        config_class.from_config(block)
    assert module not in sys.modules


def sparse_config_class():
    pytest.importorskip("vllm", reason="vLLM isn't installed; see README, Versions")
    from sinkprune_plugin.vllm.sparse_quantization import SparseConfig

    return SparseConfig


def test_who_takes_a_configuration():
    take = sparse_config_class().override_quantization_method
    sparsity = {"format": "sparse-bitmask"}
    assert take({"quant_method": "compressed-tensors", "sparsity_config": sparsity}, None) == (
        "compressed-tensors-sparse"
    )
    assert take({"quant_method": "", "sparsity_config": sparsity}, None) == "compressed-tensors-sparse"
    assert take({"quant_method": "compressed-tensors"}, None) is None
    assert take({"quant_method": "compressed-tensors", "sparsity_config": {}}, None) is None
    assert take({"quant_method": "gptq", "sparsity_config": sparsity}, None) is None


def test_stacked_configuration_becomes_vllms_own():
    config_class = sparse_config_class()
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    activations = weights | {"strategy": "token", "dynamic": True}
    block = {
        "quant_method": "compressed-tensors-sparse",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
        "ignore": ["lm_head"],
        "sparsity_config": {"format": "sparse-24-bitmask", "targets": ["Linear"], "ignore": []},
        "sinkprune_version": "1.0",
    }
    before = json.dumps(block)
    made = config_class.from_config(block)
    assert type(made) is CompressedTensorsConfig
    assert list(made.target_scheme_map) == ["Linear"]
    assert made.ignore == ["lm_head"]
    assert json.dumps(block) == before
    sparse_only = {key: block[key] for key in ("quant_method", "sparsity_config", "sinkprune_version")}
    assert type(config_class.from_config(sparse_only)) is config_class
    assert type(config_class.from_config({**sparse_only, "quant_method": ""})) is config_class
    with pytest.raises(UsageError, match="transform_config"):
        config_class.from_config({**sparse_only, "transform_config": {"config_groups": {"a": 1}}})
