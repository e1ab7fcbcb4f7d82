"""What vLLM makes of the configuration of a sparse checkpoint."""

import json
import sys

import pytest

from sinkprune_plugin.errors import UsageError


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


@pytest.mark.parametrize("name", ["{module}:Thing", "sparse_bitmask", None, 7, ["sparse-bitmask"]])
def test_vllms_configuration_never_imports_a_hostile_format(name, tmp_path, monkeypatch):
    module = "a_hostile_module"
    (tmp_path / f"{module}.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    name = name.format(module=module) if isinstance(name, str) else name
    block = {"quant_method": "compressed-tensors-sparse", "sparsity_config": {"format": name}}
    config_class = sparse_config_class()
    with pytest.raises(UsageError, match=r"sparsity_config\.format"):
        config_class.from_config(block)
    assert module not in sys.modules
