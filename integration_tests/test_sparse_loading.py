"""Sparse checkpoints through transformers' from_pretrained: bit-exact and whole."""

import json
import subprocess
import sys

import pytest
import torch
from checkpoint_files import LEGACY
from safetensors.torch import load_file, save_file
from sparse_models import (
    FORMATS,
    SIZES,
    assert_ordinary,
    assert_same,
    edit_config,
    llama_model,
    prune_2_of_4,
    write,
    write_shards,
)
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from sinkprune_plugin.formats.codecs import bitmask
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model
from sinkprune_plugin.models.dream.configuration_dream import DreamConfig
from sinkprune_plugin.models.dream.modeling_dream import DreamModel


@pytest.fixture(scope="module")
def llama():
    return llama_model()


@pytest.fixture(scope="module", params=["llada", "dream", "llama", "qwen2"])
def pruned(request):
    torch.manual_seed(0)
    if request.param == "llada":
        return prune_2_of_4(load_model(EMBEDDED_MODEL))
    if request.param == "dream":
        return prune_2_of_4(DreamModel(DreamConfig(**SIZES, mask_token_id=63)).bfloat16())
    if request.param == "llama":
        return prune_2_of_4(LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16())
    return prune_2_of_4(Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)).bfloat16())


@pytest.mark.parametrize("method", ["compressed-tensors-sparse", "compressed-tensors"])
@pytest.mark.parametrize("sparse_format", FORMATS)
@pytest.mark.parametrize("shards", [1, 5])
def test_loads_bit_exactly_as_an_ordinary_model(pruned, tmp_path, method, sparse_format, shards):
    write(pruned, tmp_path / "sparse", sparse_format, method, shards)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype="auto", output_loading_info=True)
    assert not any(info.values())
    assert loaded.dtype == torch.bfloat16
    assert_same(loaded, pruned)
    assert_ordinary(loaded)

    loaded.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    pruned.save_pretrained(tmp_path / "dense")
    again, dense = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "dense"))
    assert again.keys() == dense.keys()
    assert all(torch.equal(again[name], dense[name]) for name in dense)


def test_a_loaded_model_can_be_trained(llama, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(write(llama, tmp_path), dtype=torch.float32)
    tokens = torch.arange(12).view(2, 6)
    loaded(input_ids=tokens, labels=tokens).loss.backward()
    assert all(weight.grad is not None for weight in loaded.parameters())


@pytest.mark.parametrize("name", ["sparse-bitmask", "sparse-24-bitmask", "sparse-bitmask-fp16"])
def test_checkpoints_of_the_old_writer(name):
    """Written by compressed-tensors 0.12.2; they hold only some of the layers' weights."""
    loaded, info = AutoModelForCausalLM.from_pretrained(LEGACY / name, dtype="auto", output_loading_info=True)
    dense = load_file(LEGACY / name / "dense" / "model.safetensors")
    tensors = loaded.state_dict()
    assert all(torch.equal(tensors[key], value) and tensors[key].dtype == value.dtype for key, value in dense.items())
    assert not info["unexpected_keys"]
    assert not info["missing_keys"] & dense.keys()
    assert_ordinary(loaded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, "auto"])
def test_weights_come_in_the_dtype_asked_for(pruned, tmp_path, dtype):
    loaded = AutoModelForCausalLM.from_pretrained(write(pruned, tmp_path), dtype=dtype)
    expected = torch.bfloat16 if dtype == "auto" else dtype
    assert {tensor.dtype for tensor in loaded.parameters()} == {expected}
    assert_same(loaded, pruned)


@pytest.mark.parametrize("dtype", [torch.float32, "auto"])
def test_base_model_whose_names_lose_their_prefix(llama, tmp_path, dtype):
    loaded, info = AutoModel.from_pretrained(write(llama, tmp_path), dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert len({tensor.dtype for tensor in loaded.parameters()}) == 1
    assert_same(loaded, llama.model)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_changes_no_weight(pruned, tmp_path, device_map):
    loaded = AutoModelForCausalLM.from_pretrained(write(pruned, tmp_path), dtype="auto", device_map=device_map)
    assert_same(loaded.cpu(), pruned)


def test_weights_offloaded_to_disk(llama, tmp_path):
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    write(llama, tmp_path / "sparse")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype="auto")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "sparse", dtype="auto", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert offloaded.model.layers[1].mlp.up_proj.weight.is_meta
    tokens = torch.arange(8).view(1, 8)
    with torch.no_grad():
        # The same kernels on the same numbers in the same order: no tolerance.
        assert torch.equal(offloaded(tokens).logits, whole(tokens).logits)


def test_experts_that_transformers_merges(tmp_path):
    torch.manual_seed(0)
    sizes = {**SIZES, "num_local_experts": 4}
    model = MixtralForCausalLM(MixtralConfig(**sizes)).bfloat16()
    model.save_pretrained(tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    assert any("experts.3.w1.weight" in name for name in tensors)
    prune_2_of_4(model)
    loaded = AutoModelForCausalLM.from_pretrained(write(model, tmp_path / "sparse"), dtype="auto")
    assert_same(loaded, model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.float32)
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.float32}
    assert_same(loaded, model)
    loaded.bfloat16().save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()


@pytest.mark.parametrize(
    "imports",
    [
        "from transformers import AutoModelForCausalLM",
        "from transformers.quantizers.auto import AutoHfQuantizer; from transformers import AutoModelForCausalLM",
        "from transformers.modeling_utils import PreTrainedModel; from transformers import AutoModelForCausalLM",
    ],
)
def test_nothing_of_ours_imported(llama, tmp_path, imports):
    """Whichever module of transformers is what first imports torch, and with it our entry point."""
    directories = [
        str(write(llama, tmp_path / method, method=method))
        for method in ("compressed-tensors-sparse", "compressed-tensors")
    ]
    save_file(llama.state_dict(), tmp_path / "expected.safetensors")
    script = f"""
{imports}
import torch
from safetensors.torch import load_file
expected = load_file({str(tmp_path / "expected.safetensors")!r})
for directory in {directories}:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("layout", ["full names", "full names and compression_config"])
def test_layout_before_0_9(llama, tmp_path, layout):
    """The prefix keeps .weight and every tensor is compressed, norms too."""
    write(llama, tmp_path)
    stored = {}
    for name, tensor in llama.state_dict().items():
        parts = bitmask.compress(tensor.reshape(-1, tensor.shape[-1]))
        if tensor.ndim == 1:
            # What the old writer makes of a vector: no row axis anywhere.
            parts["shape"] = parts["shape"][1:]
            parts["bitmask"] = parts["bitmask"][0].clone()
            parts["row_offsets"] = parts["row_offsets"][0].clone()
        stored |= {f"{name}.{part}": value for part, value in parts.items()}
    write_shards(tmp_path, stored, 1)
    config = {"sparsity_config": {"format": "sparse-bitmask", "global_sparsity": 0.5}}
    if layout == "full names":
        edit_config(tmp_path, quantization_config={"quant_method": "compressed-tensors", **config})
    else:
        edit_config(tmp_path, quantization_config=..., compression_config=config)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(info.values())
    assert_same(loaded, llama)
    assert_ordinary(loaded)
    assert not hasattr(loaded.config, "compression_config")


@pytest.mark.parametrize("method", ["compressed-tensors-sparse", "compressed-tensors"])
def test_oneshot_takes_a_sparse_checkpoint(llama, tmp_path, method):
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    write(llama, tmp_path / "sparse", method=method)
    recipe = QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])
    model = oneshot(model=str(tmp_path / "sparse"), recipe=recipe, output_dir=str(tmp_path / "out"))
    assert torch.equal(model.lm_head.weight, llama.lm_head.weight)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "compressed-tensors"
    assert "sparsity_config" not in written or written["sparsity_config"] in ({}, None)


def test_config_alone_is_read_unchanged(llama, tmp_path):
    write(llama, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.quantization_config["quant_method"] == "compressed-tensors-sparse"
    for _ in range(2):
        assert_same(AutoModelForCausalLM.from_pretrained(tmp_path, config=config, dtype="auto"), llama)
