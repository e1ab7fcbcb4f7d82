"""What we write under layout legacy is read bit-exactly by the releases of compressed-tensors that could, and back.

Needs a package index with compressed-tensors 0.12.2 and 0.14.0. Each is installed once, without its dependencies, into
a directory that comes first on the path of a process which otherwise uses this environment, torch and transformers
included, and in which this package's entry points are off.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sinkprune_plugin.formats import load_sparse_checkpoint, save_sparse_checkpoint

pytestmark = [pytest.mark.slow]

RELEASES = ["0.12.2", "0.14.0"]
FORMATS = ["sparse-bitmask", "sparse-24-bitmask"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
DTYPES["float8_e4m3fn"] = torch.float8_e4m3fn

# Runs with the old release; every check of the old reader is here, the comparisons of files with ours are outside.
OLD_SIDE = """
import json, sys
from pathlib import Path

import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.config import SparsityCompressionConfig
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaForCausalLM

release, root = sys.argv[1], Path(sys.argv[2])
assert compressed_tensors.__version__ == release, compressed_tensors.__file__


def same(found, wanted):
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        ours, theirs = (each.contiguous().view(-1).view(torch.uint8) for each in (found[name], tensor))
        assert torch.equal(ours, theirs), name


def compressor_of(directory):
    config = json.loads((directory / "config.json").read_text())
    return ModelCompressor.from_compression_config(config["quantization_config"])


def expected(name):
    return load_file(root / "dense" / f"{name}.safetensors")


def state(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


dense = expected("llama")
checked = []
(root / f"old-{release}").mkdir()
for directory in sorted(root.glob("llama-*")):
    compressor = ModelCompressor.from_pretrained(directory)
    assert compressor.quantization_config is None
    # From disk, tensor by tensor.
    same(dict(compressor.sparsity_compressor.decompress(str(directory))), dense)

    # From disk, into a model.
    model = LlamaForCausalLM(AutoConfig.from_pretrained(directory)).bfloat16()
    compressor.decompress(str(directory), model)
    same(model.state_dict(), dense)

    # In memory, as transformers 4 loaded: by the targets that config.json names.
    stored = state(directory)
    model = LlamaForCausalLM(AutoConfig.from_pretrained(directory)).bfloat16()
    sparse = {name for name in dense if name not in stored}
    assert set(compressor.get_missing_module_keys(model)) == sparse
    assert set(compressor.get_unexpected_file_keys(model)) == stored.keys() - dense.keys()
    for name, tensor in stored.items():
        owner, _, part = name.rpartition(".")
        module = model.get_submodule(owner)
        if f"{owner}.weight" in sparse and hasattr(module, "weight"):
            del module.weight
        module.register_parameter(part, torch.nn.Parameter(tensor, requires_grad=False))
    compressor.decompress_model(model)
    same(model.state_dict(), dense)
    checked.append(directory.name)

# LLaDA's names: the vocabulary projection is called like a part of every block.
directory = root / "llada"
compressor = compressor_of(directory)
same(dict(compressor.sparsity_compressor.decompress(str(directory))), expected("llada"))
block = torch.nn.ModuleDict({"ff_out": torch.nn.Linear(16, 8), "q_proj": torch.nn.Linear(16, 8)})
transformer = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([block]), "ff_out": torch.nn.Linear(16, 8)})
model = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"transformer": transformer})})
assert set(compressor.get_missing_module_keys(model)) == {
    "model.transformer.blocks.0.ff_out.weight", "model.transformer.blocks.0.q_proj.weight"
}
checked.append("llada")

# Quantized and 2:4.
directory = root / "stacked"
compressor = compressor_of(directory)
assert compressor.quantization_config.format == "int-quantized"
same(dict(compressor.sparsity_compressor.decompress(str(directory))), expected("stacked"))
checked.append("stacked")

# Every dtype in both formats, read and written.
for directory in sorted(root.glob("dtype-*")):
    _, dtype, sparse_format = directory.name.split("-", 2)
    config = SparsityCompressionConfig.load_from_registry(
        sparse_format, sparsity_structure="2:4" if "24" in sparse_format else "unstructured"
    )
    codec = BaseCompressor.load_from_registry(sparse_format, config=config)
    weights = expected(directory.name)
    same(dict(codec.decompress(str(directory))), weights)
    old = codec.compress(weights, compression_targets={"l.0.a", "l.1.a"})
    save_file(old, root / f"old-{release}" / f"{directory.name}.safetensors")
    checked.append(directory.name)
print(json.dumps(checked))
"""


@pytest.fixture(scope="module", params=RELEASES)
def release(request, tmp_path_factory):
    """(version, directory that holds it)"""
    target = tmp_path_factory.mktemp("compressed-tensors")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
    subprocess.run([*install, f"compressed-tensors=={request.param}"], check=True)
    return request.param, target


def _two_of_four(weight):
    groups = weight.view(-1, 4)
    return groups.scatter(1, groups.float().abs().topk(2, largest=False).indices, 0).view(weight.shape)


def _dtype_weights(dtype, sparse_format):
    generator = torch.Generator().manual_seed(0)
    # The old 2:4 writer loses −128; everything else that int8 holds is here.
    weights = {}
    for layer, (rows, columns) in enumerate([(8, 24), (24, 16) if "24" in sparse_format else (5, 13)]):
        weight = torch.randint(-127, 128, (rows, columns), generator=generator)
        if "24" in sparse_format:
            weight = _two_of_four(weight)
            weight[0, :4] = 0
            weight[1, :8] = torch.tensor([7, 0, 0, 0, 0, 0, 9, 0])
        else:
            weight[torch.rand(rows, columns, generator=generator) < 0.5] = 0
            weight[2] = 0
        weights[f"l.{layer}.a.weight"] = weight.to(dtype)
    return weights


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Checkpoints in layout legacy, and the dense tensors to compare with."""
    root = tmp_path_factory.mktemp("written")
    (root / "dense").mkdir()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).bfloat16()
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and ".layers." in name:
            weight.data = _two_of_four(weight.data)
    dense = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    save_file(dense, root / "dense" / "llama.safetensors")
    for sparse_format in FORMATS:
        for shard_bytes in (10**9, 6000):
            save_sparse_checkpoint(
                dense,
                root / f"llama-{sparse_format}-{shard_bytes}",
                format=sparse_format,
                layout="legacy",
                config=model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]},
                max_shard_bytes=shard_bytes,
            )

    prefix = "model.transformer"
    names = [f"{prefix}.blocks.0.ff_out", f"{prefix}.blocks.0.q_proj", f"{prefix}.ff_out"]
    llada = {f"{name}.weight": _two_of_four(torch.randn(8, 16)).bfloat16() for name in names}
    save_file(llada, root / "dense" / "llada.safetensors")
    save_sparse_checkpoint(llada, root / "llada", layout="legacy", config={"model_type": "llada"})

    stacked = {"model.layers.0.q_proj.weight": _two_of_four(torch.randint(-127, 128, (8, 16))).to(torch.int8)}
    stacked["model.layers.0.q_proj.weight_scale"] = torch.rand(8, 1)
    save_file(stacked, root / "dense" / "stacked.safetensors")
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    save_sparse_checkpoint(stacked, root / "stacked", layout="legacy", config={"quantization_config": quantization})

    for dtype_name, dtype in DTYPES.items():
        for sparse_format in FORMATS:
            name = f"dtype-{dtype_name}-{sparse_format}"
            tensors = _dtype_weights(dtype, sparse_format)
            save_file(tensors, root / "dense" / f"{name}.safetensors")
            save_sparse_checkpoint(tensors, root / name, format=sparse_format, layout="legacy", targets=list(tensors))
    return root


def _assert_same_bits(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert (
            found[name].contiguous().view(-1).view(torch.uint8).tolist() == tensor.view(-1).view(torch.uint8).tolist()
        )


def test_old_release_reads_ours_and_we_read_its(release, written, tmp_path):
    version, directory = release
    environment = os.environ | {"PYTHONPATH": str(directory), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    result = subprocess.run(
        [sys.executable, "-c", OLD_SIDE, version, str(written)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    checked = json.loads(result.stdout.splitlines()[-1])
    assert len(checked) == len(FORMATS) * (2 + len(DTYPES)) + 2

    for name in (name for name in checked if name.startswith("dtype-")):
        ours = load_file(written / name / "model.safetensors")
        theirs = load_file(written / f"old-{version}" / f"{name}.safetensors")
        # The tensors are the same, whoever wrote them.
        _assert_same_bits(ours, theirs)
        # A file of theirs, under our configuration of that format.
        copy = shutil.copytree(written / name, tmp_path / name)
        save_file(theirs, copy / "model.safetensors", metadata={"format": "pt"})
        _assert_same_bits(load_sparse_checkpoint(copy), load_file(written / "dense" / f"{name}.safetensors"))
