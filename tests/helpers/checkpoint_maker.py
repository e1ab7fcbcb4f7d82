"""Small checkpoints for the tests of formats/."""

import json

import torch
from safetensors.torch import save_file

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 12}


def two_of_four(rows, columns, dtype=torch.bfloat16):
    """A weight with exactly two non-zeros in each group of four."""
    values = torch.randint(1, 100, (rows, columns))
    ranks = torch.rand(rows, columns // 4, 4).argsort(dim=-1).view(rows, columns)
    return (values * (ranks < 2)).to(dtype)


def unstructured(rows, columns, zeros=0.5, dtype=torch.bfloat16):
    values = torch.randint(1, 100, (rows, columns)) * (torch.rand(rows, columns) >= zeros)
    values[0, :4] = torch.tensor([1, 2, 3, 0])  # surely not 2:4
    return values.to(dtype)


def model(weight=two_of_four):
    """Name → tensor, with what no format may touch: norm, bias, embedding, vocabulary projection, a buffer."""
    torch.manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(12, 32).bfloat16()}
    for layer in range(3):
        block = f"model.layers.{layer}"
        tensors[f"{block}.input_layernorm.weight"] = torch.ones(32).bfloat16()
        tensors[f"{block}.self_attn.q_proj.weight"] = weight(16, 32)
        tensors[f"{block}.self_attn.q_proj.bias"] = torch.randn(16).bfloat16()
        tensors[f"{block}.mlp.down_proj.weight"] = weight(32, 48)
    tensors["model.rotary.inv_freq"] = torch.arange(4)
    tensors["lm_head.weight"] = torch.randn(12, 32).bfloat16()
    tensors["lm_head.weight"][:, ::2] = 0
    return tensors


TARGETS = sorted(
    f"model.layers.{layer}.{name}.weight" for layer in range(3) for name in ("self_attn.q_proj", "mlp.down_proj")
)


def write_dense(directory, tensors, shards=1, config=CONFIG):
    """A dense checkpoint with all the files that are usually next to the weights."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    for name in (
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "recipe.yaml",
    ):
        (directory / name).write_text(f"content of {name} ü")
    files = [f"model-{number + 1:05}-of-{shards:05}.safetensors" for number in range(shards)]
    if shards == 1:
        files = ["model.safetensors"]
    weight_map = {name: files[position * shards // len(tensors)] for position, name in enumerate(tensors)}
    for file in files:
        held = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(held, directory / file, metadata={"format": "pt"})
    if shards > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        data, wanted = (each.contiguous().reshape(-1).view(torch.uint8) for each in (found[name], tensor))
        assert torch.equal(data, wanted), name
