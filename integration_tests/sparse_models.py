"""Small pruned models, and their sparse checkpoints written with nothing but the codecs."""

import json
import re

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from sinkprune_plugin.formats.codecs import bitmask, bitmask24

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


def prune_2_of_4(model):
    """Magnitude 2:4 on the decoder blocks, in place; also 50 % unstructured, so that both formats can hold it."""
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 and re.search(r"\.\d+\.", name):
            groups = weight.data.view(-1, 4)
            weight.data = groups.scatter(1, groups.float().abs().topk(2, largest=False).indices, 0).view(weight.shape)
    return model


def llama_model():
    torch.manual_seed(0)
    return prune_2_of_4(LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16())


def sparsify(tensors, sparse_format):
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


def write_shards(directory, stored, count):
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


def edit_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    config |= changes
    (directory / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != ...}))


def write(model, directory, sparse_format="sparse-bitmask", method="compressed-tensors-sparse", shards=1):
    """Write a sparse checkpoint with nothing but the codec, so that the loader is tested alone."""
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    write_shards(directory, sparsify(tensors, sparse_format), shards)
    edit_config(directory, quantization_config=quantization_config(sparse_format, method))
    return directory


def quantization_config(sparse_format, method="compressed-tensors-sparse"):
    sparsity = {"format": sparse_format, "targets": ["Linear"], "ignore": ["lm_head"], "sparsity_structure": "2:4"}
    return {"quant_method": method, "sparsity_config": {**sparsity, "registry_requires_subclass": False}}


def assert_same(loaded, model):
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


def assert_ordinary(model):
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model, "quantization_method")
    assert getattr(model.config, "quantization_config", None) is None
