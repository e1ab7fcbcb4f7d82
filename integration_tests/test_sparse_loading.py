"""Sparse checkpoints through transformers' from_pretrained: bit-exact, whole, or refused in one line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
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

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import bitmask, bitmask24
from sinkprune_plugin.formats.format_names import CheckpointFormat
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model
from sinkprune_plugin.models.dream.configuration_dream import DreamConfig
from sinkprune_plugin.models.dream.modeling_dream import DreamModel

LEGACY = Path(__file__).parent.parent / "tests" / "fixtures" / "legacy_checkpoints"
COMPRESS = {"sparse-bitmask": bitmask.compress, "sparse-24-bitmask": bitmask24.compress}
FORMATS = sorted(COMPRESS)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}


def _prune(model):
    """Magnitude 2:4 on the decoder blocks, in place; also 50 % unstructured, so that both formats can hold it."""
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 and re.search(r"\.\d+\.", name):
            groups = weight.data.view(-1, 4)
            weight.data = groups.scatter(1, groups.float().abs().topk(2, largest=False).indices, 0).view(weight.shape)
    return model


@pytest.fixture(scope="module", params=["llada", "dream", "llama", "qwen2"])
def pruned(request):
    torch.manual_seed(0)
    if request.param == "llada":
        return _prune(load_model(EMBEDDED_MODEL))
    if request.param == "dream":
        return _prune(DreamModel(DreamConfig(**SIZES, mask_token_id=63)).bfloat16())
    if request.param == "llama":
        return _prune(LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16())
    return _prune(Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)).bfloat16())


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return _prune(LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16())


def _sparsify(tensors, sparse_format):
    """Tensors as stored: the weights of the decoder blocks' Linears in parts."""
    stored = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and name.endswith(".weight") and re.search(r"\.\d+\.", name):
            owner = name.removesuffix(".weight")
            parts = COMPRESS[sparse_format](tensor)
            stored |= {f"{owner}.{part}": value for part, value in parts.items()}
        else:
            stored[name] = tensor
    return stored


def _shards(directory, stored, count):
    """Write tensors in turn into shards, so that the parts of each weight lie in different ones."""
    if count == 1:
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
        return
    files = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
    weight_map = {name: files[position % count] for position, name in enumerate(sorted(stored))}
    for file in files:
        shard = {name: stored[name] for name in stored if weight_map[name] == file}
        save_file(shard, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _edit_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    config |= changes
    (directory / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != ...}))


def _write(model, directory, sparse_format="sparse-bitmask", method="compressed-tensors-sparse", shards=1):
    """Write a sparse checkpoint with nothing but the codec, so that the loader is tested alone."""
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    _shards(directory, _sparsify(tensors, sparse_format), shards)
    _edit_config(directory, quantization_config=_quantization_config(sparse_format, method))
    return directory


def _quantization_config(sparse_format, method="compressed-tensors-sparse"):
    sparsity = {"format": sparse_format, "targets": ["Linear"], "ignore": ["lm_head"], "sparsity_structure": "2:4"}
    return {"quant_method": method, "sparsity_config": {**sparsity, "registry_requires_subclass": False}}


def _assert_same(loaded, model):
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


def _assert_ordinary(model):
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model, "quantization_method")
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize("method", ["compressed-tensors-sparse", "compressed-tensors"])
@pytest.mark.parametrize("sparse_format", FORMATS)
@pytest.mark.parametrize("shards", [1, 5])
def test_loads_bit_exactly_as_an_ordinary_model(pruned, tmp_path, method, sparse_format, shards):
    _write(pruned, tmp_path / "sparse", sparse_format, method, shards)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype="auto", output_loading_info=True)
    assert not any(info.values())
    assert loaded.dtype == torch.bfloat16
    _assert_same(loaded, pruned)
    _assert_ordinary(loaded)

    loaded.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    pruned.save_pretrained(tmp_path / "dense")
    again, dense = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "dense"))
    assert again.keys() == dense.keys()
    assert all(torch.equal(again[name], dense[name]) for name in dense)


def test_a_loaded_model_can_be_trained(llama, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(_write(llama, tmp_path), dtype=torch.float32)
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
    _assert_ordinary(loaded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, "auto"])
def test_weights_come_in_the_dtype_asked_for(pruned, tmp_path, dtype):
    loaded = AutoModelForCausalLM.from_pretrained(_write(pruned, tmp_path), dtype=dtype)
    expected = torch.bfloat16 if dtype == "auto" else dtype
    assert {tensor.dtype for tensor in loaded.parameters()} == {expected}
    _assert_same(loaded, pruned)


@pytest.mark.parametrize("dtype", [torch.float32, "auto"])
def test_base_model_whose_names_lose_their_prefix(llama, tmp_path, dtype):
    loaded, info = AutoModel.from_pretrained(_write(llama, tmp_path), dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert len({tensor.dtype for tensor in loaded.parameters()}) == 1
    _assert_same(loaded, llama.model)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_changes_no_weight(pruned, tmp_path, device_map):
    loaded = AutoModelForCausalLM.from_pretrained(_write(pruned, tmp_path), dtype="auto", device_map=device_map)
    _assert_same(loaded.cpu(), pruned)


def test_weights_offloaded_to_disk(llama, tmp_path):
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    _write(llama, tmp_path / "sparse")
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
    _prune(model)
    loaded = AutoModelForCausalLM.from_pretrained(_write(model, tmp_path / "sparse"), dtype="auto")
    _assert_same(loaded, model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.float32)
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.float32}
    _assert_same(loaded, model)
    loaded.bfloat16().save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()


@pytest.mark.parametrize("damage", ["mask", "mixed"])
def test_a_damaged_expert_is_refused_in_one_line(tmp_path, damage):
    torch.manual_seed(0)
    model = _prune(MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)).bfloat16())
    _write(model, tmp_path)
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


def test_tensor_parallel_model_is_refused():
    """The loader would cut the parts of a weight where it should cut the weight."""
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    from sinkprune_plugin.formats.load_context import LoadContext
    from sinkprune_plugin.formats.part_groups import PartGroups

    model = torch.nn.Linear(4, 4)
    context = LoadContext(CheckpointFormat.SPARSE_BITMASK, PartGroups({}, {}), torch.float32, {})
    context.refuse_sharded(model)
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model.weight = torch.nn.Parameter(distribute_tensor(model.weight, init_device_mesh("cpu", (1,))))
        context = LoadContext(CheckpointFormat.SPARSE_BITMASK, PartGroups({}, {}), torch.float32, {})
        with pytest.raises(UsageError, match="tensor parallelism"):
            context.refuse_sharded(model)
    finally:
        destroy_process_group()


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
        str(_write(llama, tmp_path / method, method=method))
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
    _write(llama, tmp_path)
    stored = {}
    for name, tensor in llama.state_dict().items():
        parts = bitmask.compress(tensor.reshape(-1, tensor.shape[-1]))
        if tensor.ndim == 1:
            # What the old writer makes of a vector: no row axis anywhere.
            parts["shape"] = parts["shape"][1:]
            parts["bitmask"] = parts["bitmask"][0].clone()
            parts["row_offsets"] = parts["row_offsets"][0].clone()
        stored |= {f"{name}.{part}": value for part, value in parts.items()}
    _shards(tmp_path, stored, 1)
    config = {"sparsity_config": {"format": "sparse-bitmask", "global_sparsity": 0.5}}
    if layout == "full names":
        _edit_config(tmp_path, quantization_config={"quant_method": "compressed-tensors", **config})
    else:
        _edit_config(tmp_path, quantization_config=..., compression_config=config)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(info.values())
    _assert_same(loaded, llama)
    _assert_ordinary(loaded)
    assert not hasattr(loaded.config, "compression_config")


@pytest.mark.parametrize("method", ["compressed-tensors-sparse", "compressed-tensors"])
@pytest.mark.parametrize(
    "name", ["os:system", "/tmp/evil.py:Config", "antigravity:fly", "sparse-bitmask:x", "", None, 3]
)
def test_hostile_format_is_refused_and_nothing_imported(llama, tmp_path, method, name):
    _write(llama, tmp_path)
    _edit_config(tmp_path, quantization_config=_quantization_config(name, method))
    before = set(sys.modules)
    with pytest.raises(UsageError, match="the formats are dense, sparse-bitmask, sparse-24-bitmask"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not {module for module in set(sys.modules) - before if "antigravity" in module or "evil" in module}


@pytest.mark.parametrize("method", ["compressed-tensors-sparse", "compressed-tensors"])
@pytest.mark.parametrize("dtype", [torch.float32, "auto"])
def test_dense_format_without_quantization(llama, tmp_path, method, dtype):
    """What old releases of llm-compressor write for a pruned model; transformers by itself fails on it."""
    llama.save_pretrained(tmp_path)
    _edit_config(tmp_path, quantization_config=_quantization_config("dense", method))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == (torch.bfloat16 if dtype == "auto" else dtype)
    _assert_same(loaded, llama)
    _assert_ordinary(loaded)


def test_dispatch_key_without_sparsity_config(llama, tmp_path):
    _write(llama, tmp_path)
    _edit_config(tmp_path, quantization_config={"quant_method": "compressed-tensors-sparse"})
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
    _write(llama, tmp_path, sparse_format)
    _change(tmp_path, lambda stored: stored.pop(f"{OWNER}.{part}"))
    with pytest.raises(UsageError, match=rf"{re.escape(OWNER)}\.{part}, which sparse-.* needs, is in no file"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("sparse_format", FORMATS)
def test_values_that_do_not_fit_the_mask(llama, tmp_path, sparse_format):
    _write(llama, tmp_path, sparse_format)

    def flip(stored):
        stored[f"{OWNER}.bitmask"][0, 0] ^= 1

    _change(tmp_path, flip)
    with pytest.raises(UsageError, match=re.escape(OWNER)) as raised:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(raised.value)
    assert "model.safetensors" in str(raised.value)


def test_weight_stored_twice(llama, tmp_path):
    _write(llama, tmp_path)
    _change(tmp_path, lambda stored: stored.update({f"{OWNER}.weight": torch.zeros(32, 48)}))
    with pytest.raises(UsageError, match=rf"{re.escape(OWNER)}\.weight is stored twice"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", [{"intermediate_size": 64}, {"vocab_size": 80}])
def test_config_of_another_model(llama, tmp_path, change):
    _write(llama, tmp_path)
    _edit_config(tmp_path, **change)
    with pytest.raises(UsageError, match=r"config\.json doesn't belong to these weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


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
    _assert_same(loaded, stock)
    tokens = torch.arange(8).view(1, 8)
    with torch.no_grad():
        # The same numbers through the same code: no tolerance.
        assert torch.equal(loaded(tokens).logits, stock(tokens).logits)


@pytest.mark.parametrize("dense_sparsity", [False, True])
def test_stock_quantized_checkpoint_is_left_to_transformers(llama, tmp_path, monkeypatch, dense_sparsity):
    directory = _quantized(llama, tmp_path, "FP8_DYNAMIC")
    if dense_sparsity:
        config = json.loads((directory / "config.json").read_text())["quantization_config"]
        _edit_config(directory, quantization_config={**config, "sparsity_config": {"format": "dense"}})
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
    stored = _sparsify(tensors, "sparse-24-bitmask")
    assert stored["model.layers.0.mlp.up_proj.compressed"].dtype.itemsize == 1
    (directory / "model.safetensors").unlink()
    _shards(directory, stored, 3)
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    _edit_config(directory, quantization_config=config | _quantization_config("sparse-24-bitmask", method))
    _assert_same_quantized(AutoModelForCausalLM.from_pretrained(directory, dtype="auto"), stock)

    options = {"quantization_config": type(stock.hf_quantizer.quantization_config)(dequantize=True)}
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", **options)
    _assert_same(loaded, dequantized)
    _assert_ordinary(loaded)


@pytest.mark.parametrize("method", ["compressed-tensors-sparse", "compressed-tensors"])
def test_oneshot_takes_a_sparse_checkpoint(llama, tmp_path, method):
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    _write(llama, tmp_path / "sparse", method=method)
    recipe = QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])
    model = oneshot(model=str(tmp_path / "sparse"), recipe=recipe, output_dir=str(tmp_path / "out"))
    assert torch.equal(model.lm_head.weight, llama.lm_head.weight)
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "compressed-tensors"
    assert "sparsity_config" not in written or written["sparsity_config"] in ({}, None)


def test_config_alone_is_read_unchanged(llama, tmp_path):
    _write(llama, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.quantization_config["quant_method"] == "compressed-tensors-sparse"
    for _ in range(2):
        _assert_same(AutoModelForCausalLM.from_pretrained(tmp_path, config=config, dtype="auto"), llama)
