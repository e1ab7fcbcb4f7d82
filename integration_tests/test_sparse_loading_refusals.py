"""Sparse checkpoints that transformers' from_pretrained must refuse, in one line and with nothing imported."""

import re
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparse_models import (
    FORMATS,
    SIZES,
    assert_ordinary,
    assert_same,
    edit_config,
    llama_model,
    prune_2_of_4,
    quantization_config,
    write,
)
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats.codecs import bitmask
from sinkprune_plugin.formats.codecs.format_names import CheckpointFormat


@pytest.fixture(scope="module")
def llama():
    return llama_model()


@pytest.mark.parametrize("damage", ["mask", "mixed"])
def test_a_damaged_expert_is_refused_in_one_line(tmp_path, damage):
    torch.manual_seed(0)
    model = prune_2_of_4(MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)).bfloat16())
    write(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    owner = next(name for name in stored if "experts.2." in name).rpartition(".")[0]
    if damage == "mask":
        stored[f"{owner}.bitmask"][0, 0] ^= 1
    else:
        parts = {part: stored.pop(f"{owner}.{part}") for part in ("compressed", "bitmask", "shape", "row_offsets")}
        stored[f"{owner}.weight"] = bitmask.decompress(parts)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"model\.layers\.0\.mlp\.experts") as raised:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("process_group")
def test_tensor_parallel_model_is_refused():
    """The loader would split the parts of a weight where it should split the weight."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    from sinkprune_plugin.formats.files.part_groups import PartGroups
    from sinkprune_plugin.transformers.load_context import LoadContext

    model = torch.nn.Linear(4, 4)
    context = LoadContext(CheckpointFormat.SPARSE_BITMASK, PartGroups({}, {}), torch.float32, {})
    context.refuse_sharded(model)
    model.weight = torch.nn.Parameter(distribute_tensor(model.weight, init_device_mesh("cpu", (1,))))
    context = LoadContext(CheckpointFormat.SPARSE_BITMASK, PartGroups({}, {}), torch.float32, {})
    with pytest.raises(UsageError, match="tensor parallelism"):
        context.refuse_sharded(model)


@pytest.mark.parametrize("method", ["compressed-tensors-sparse", "compressed-tensors"])
@pytest.mark.parametrize(
    "name", ["os:system", "/tmp/evil.py:Config", "antigravity:fly", "sparse-bitmask:x", "", None, 3]
)
def test_hostile_format_is_refused_and_nothing_imported(llama, tmp_path, method, name):
    write(llama, tmp_path)
    edit_config(tmp_path, quantization_config=quantization_config(name, method))
    before = set(sys.modules)
    with pytest.raises(UsageError, match="the formats are dense, sparse-bitmask, sparse-24-bitmask"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not {module for module in set(sys.modules) - before if "antigravity" in module or "evil" in module}


@pytest.mark.parametrize("method", ["compressed-tensors-sparse", "compressed-tensors"])
@pytest.mark.parametrize("dtype", [torch.float32, "auto"])
def test_dense_format_without_quantization(llama, tmp_path, method, dtype):
    """What old releases of llm-compressor write for a pruned model; transformers on its own fails on it."""
    llama.save_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config=quantization_config("dense", method))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == (torch.bfloat16 if dtype == "auto" else dtype)
    assert_same(loaded, llama)
    assert_ordinary(loaded)


def test_dispatch_key_without_sparsity_config(llama, tmp_path):
    write(llama, tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "compressed-tensors-sparse"})
    with pytest.raises(UsageError, match="needs a sparsity_config"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


OWNER = "model.layers.1.mlp.down_proj"


def _change(directory, change):
    stored = load_file(directory / "model.safetensors")
    change(stored)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("sparse_format", FORMATS)
@pytest.mark.parametrize("part", ["compressed", "bitmask", "shape", "row_offsets"])
def test_a_missing_part_of_a_weight_is_named(llama, tmp_path, sparse_format, part):
    if sparse_format == "sparse-24-bitmask" and part == "row_offsets":
        pytest.skip("not a part of this format")
    write(llama, tmp_path, sparse_format)
    _change(tmp_path, lambda stored: stored.pop(f"{OWNER}.{part}"))
    with pytest.raises(UsageError, match=rf"{re.escape(OWNER)}\.{part}, which sparse-.* needs, is in no file"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("sparse_format", FORMATS)
def test_values_that_do_not_fit_the_mask(llama, tmp_path, sparse_format):
    write(llama, tmp_path, sparse_format)

    def flip(stored):
        stored[f"{OWNER}.bitmask"][0, 0] ^= 1

    _change(tmp_path, flip)
    with pytest.raises(UsageError, match=re.escape(OWNER)) as raised:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(raised.value)
    assert "model.safetensors" in str(raised.value)


def test_weight_stored_twice(llama, tmp_path):
    write(llama, tmp_path)
    _change(tmp_path, lambda stored: stored.update({f"{OWNER}.weight": torch.zeros(32, 48)}))
    with pytest.raises(UsageError, match=rf"{re.escape(OWNER)}\.weight is stored twice"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", [{"intermediate_size": 64}, {"vocab_size": 80}])
def test_config_of_another_model(llama, tmp_path, change):
    write(llama, tmp_path)
    edit_config(tmp_path, **change)
    with pytest.raises(UsageError, match=r"config\.json doesn't belong to these weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
