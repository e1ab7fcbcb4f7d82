"""compressed-tensors' note of removed experts, in the configurations that have a place for it."""

import json

import pytest
import torch

from sinkprune_plugin.formats import convert_checkpoint, load_sparse_checkpoint, save_sparse_checkpoint

KEPT = [[], [0, 2, 3], [1, 2]]
NOTE = {"method": "prune", "num_experts": [None, 3, 2]}
FP8 = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}},
}


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def weights():
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight.view(-1, 4)[:, :2] = 0
    return {"model.layers.0.q_proj.weight": weight}


@pytest.fixture
def sparse(tmp_path):
    config = {"model_type": "llada2_moe", "sinkprune_kept_experts": KEPT}
    save_sparse_checkpoint(weights(), tmp_path / "sparse", config=config)
    return tmp_path / "sparse"


def test_a_sparse_checkpoint_has_it_and_is_read_as_before(sparse):
    assert config_of(sparse)["quantization_config"]["moe_sparsity_config"] == NOTE
    (name,) = weights()
    assert torch.equal(load_sparse_checkpoint(sparse)[name], weights()[name])


def test_a_dense_one_does_not_pass_for_quantized(sparse, tmp_path):
    convert_checkpoint(sparse, tmp_path / "dense", to="dense")
    assert "quantization_config" not in config_of(tmp_path / "dense")


def test_a_quantized_one_has_it_beside_its_scheme(tmp_path):
    config = {"quantization_config": FP8, "sinkprune_kept_experts": KEPT}
    dense = {"model.layers.0.q_proj.weight": torch.ones(8, 16).to(torch.float8_e4m3fn)}
    save_sparse_checkpoint(dense, tmp_path / "fp8", format="dense", config=config)
    assert config_of(tmp_path / "fp8")["quantization_config"] == FP8 | {"moe_sparsity_config": NOTE}


def test_layout_legacy_and_models_with_all_experts_have_none(tmp_path):
    config = {"sinkprune_kept_experts": KEPT}
    save_sparse_checkpoint(weights(), tmp_path / "legacy", layout="legacy", config=config)
    save_sparse_checkpoint(weights(), tmp_path / "whole", config={"model_type": "llada2_moe"})
    for name in ("legacy", "whole"):
        assert "moe_sparsity_config" not in config_of(tmp_path / name)["quantization_config"]
