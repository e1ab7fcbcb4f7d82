"""Sparse checkpoints in vLLM: the same logits and tokens as from the dense ones, or refused in one line."""

import json
import re
import subprocess
import sys

import pytest
import torch
from official_checkpoints import write_dream, write_llada
from safetensors.torch import load_file, save_file
from unequal_blocks import write_unequal_llada
from vllm_engine import clean_environment, skip_without_vllm
from vllm_modules import forward_function, loader, tokens_of

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import convert_checkpoint, save_sparse_checkpoint
from sinkprune_plugin.formats.codecs import bitmask
from sinkprune_plugin.vllm.cpu import is_cpu_build, server_environment


@pytest.fixture(scope="module")
def load():
    with loader() as load:
        yield load


@pytest.fixture
def logits(monkeypatch):
    return forward_function(monkeypatch)


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def write_llama(folder):
    generator = torch.Generator().manual_seed(3)
    width, hidden, rows = LLAMA["hidden_size"], LLAMA["intermediate_size"], LLAMA["vocab_size"]
    shapes = {
        "model.embed_tokens.weight": (rows, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (rows, width),
    }
    for i in range(LLAMA["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (width, width) for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (width // 2, width) for name in "kv"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, hidden)
    tensors = {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        for name, shape in shapes.items()
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return LLAMA, tensors


# LLaDA's blocks differ in their sizes, which none of these formats may mind.
WRITE = {"llada": write_unequal_llada, "dream": write_dream, "llama": write_llama}
# Named in full, one of each model; both are in the last layer and not fused with another.
STAYS_DENSE = ("model.layers.1.mlp.down_proj", "model.transformer.blocks.1.attn_out")


def prune(tensors):
    """2:4 in the decoder's Linears, which either format can hold."""
    for name, weight in tensors.items():
        if weight.ndim == 2 and re.search(r"\.\d+\.", name):
            groups = weight.view(-1, 4)
            groups.scatter_(1, groups.abs().topk(2, largest=False).indices, 0)
    return tensors


@pytest.fixture(scope="module", params=["llada", "dream", "llama"])
def pruned(request, tmp_path_factory):
    """Directory of a dense checkpoint of a pruned model, and its configuration."""
    folder = tmp_path_factory.mktemp(request.param) / "dense"
    config, tensors = WRITE[request.param](folder)
    save_file(prune(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder, config


def test_sparse_equals_dense(pruned, tmp_path, load, logits):
    """Both formats, both layouts, parts of one weight in different files; equal to the last bit."""
    folder, config = pruned
    tokens = tokens_of(config)
    expected = logits(*load(folder), tokens)
    for number, (sparse_format, layout, shard) in enumerate(
        [
            ("sparse-bitmask", "legacy", 20_000),
            ("sparse-24-bitmask", "sinkprune", 10**9),
        ]
    ):
        sparse = tmp_path / str(number)
        tensors = load_file(folder / "model.safetensors")
        save_sparse_checkpoint(
            tensors, sparse, format=sparse_format, layout=layout, source=folder, max_shard_bytes=shard
        )
        assert any(name.endswith(".compressed") for name in load_stored(sparse))
        model, vllm_config = load(sparse)
        assert vllm_config.model_config.quantization == "compressed-tensors-sparse"
        assert torch.equal(logits(model, vllm_config, tokens), expected), (sparse_format, layout)


def load_stored(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_parts_spread_over_files(pruned, tmp_path, load, logits):
    """Each kind of part in a separate file, and the oldest layout: full names, under ``compression_config``."""
    folder, config = pruned
    tokens = tokens_of(config)
    expected = logits(*load(folder), tokens)
    stored = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        sparse = tensor.ndim == 2 and re.search(r"\.\d+\.", name)
        stored |= {f"{name}.{part}": x for part, x in bitmask.compress(tensor).items()} if sparse else {name: tensor}
    files, index = {}, {}
    for name, tensor in stored.items():
        kind = name.rpartition(".")[2]
        files.setdefault(f"model-{kind}.safetensors", {})[name] = tensor
        index[name] = f"model-{kind}.safetensors"
    assert len(files) == (6 if any(name.endswith(".bias") for name in stored) else 5)
    for file, tensors in files.items():
        save_file(tensors, tmp_path / file, metadata={"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    block = {"sparsity_config": {"format": "sparse-bitmask", "sparsity_structure": "unstructured"}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"compression_config": block}))
    assert torch.equal(logits(*load(tmp_path), tokens), expected)


def test_damaged_checkpoint(pruned, tmp_path, load):
    folder, _ = pruned
    sparse = tmp_path / "sparse"
    save_sparse_checkpoint(
        load_file(folder / "model.safetensors"), sparse, format="sparse-24-bitmask", source=folder, layout="legacy"
    )
    file = sparse / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith(".bitmask"))
    whole = dict(tensors)
    tensors[name] = tensors[name] ^ 1
    save_file(tensors, file, metadata={"format": "pt"})
    owner = re.escape(name.removesuffix(".bitmask"))
    with pytest.raises(UsageError, match=rf"^{owner}\.weight: .* in bitmask"):
        load(sparse)
    del whole[name]
    save_file(whole, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=rf"^{owner}\.weight: .* is in .*, but {owner}\.bitmask, .* is in no file"):
        load(sparse)


@pytest.mark.parametrize(
    ("write", "values"),
    [("llama", torch.int8), ("llada", torch.int8), ("llada", torch.float8_e4m3fn)],
    ids=["llama int8", "llada int8", "llada fp8"],
)
def test_stacked_quantization(write, values, tmp_path, load, logits):
    """Quantized and then sparse: vLLM's own int8 and fp8 kernels on the decompressed weights."""
    torch.cpu._init_amx()
    folder = tmp_path / "dense"
    config, tensors = WRITE[write](folder)
    largest, kind = (127, "int") if values is torch.int8 else (448, "float")
    quantized = {}
    for name, weight in prune(tensors).items():
        if weight.ndim == 2 and re.search(r"\.\d+\.", name):
            scale = weight.abs().amax(dim=1, keepdim=True) / largest
            quantized[name] = (weight / scale).round().to(values)
            quantized[f"{name}_scale"] = scale
        else:
            quantized[name] = weight
    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "channel", "dynamic": False}
    activations = weights | {"strategy": "token", "dynamic": True}
    block = {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
        # Names as in the checkpoint.
        "ignore": ["lm_head", "model.transformer.ff_out", *STAYS_DENSE],
    }
    for name in STAYS_DENSE:
        if f"{name}.weight" in tensors:
            del quantized[f"{name}.weight_scale"]
            quantized[f"{name}.weight"] = tensors[f"{name}.weight"]
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
    save_file(quantized, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = tokens_of(config)
    # fp8 kernels give bfloat16.
    expected = logits(*load(folder, dtype="bfloat16"), tokens)
    for layout in ("sinkprune", "legacy"):
        convert_checkpoint(folder, tmp_path / layout, to="sparse-24-bitmask", layout=layout)
        stored = load_stored(tmp_path / layout)
        assert any(name.endswith(".compressed") and tensor.dtype == values for name, tensor in stored.items())
        assert torch.equal(logits(*load(tmp_path / layout, dtype="bfloat16"), tokens), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_of_four_on_sparse_tensor_cores(tmp_path, load, logits, monkeypatch):
    from sinkprune_plugin.vllm import sparse_linear
    from sinkprune_plugin.vllm.sparse_kernel import KernelChoice

    if not sparse_linear.sparse_tensor_cores():
        pytest.skip("needs compute capability 8.0 and cuSPARSELt")
    monkeypatch.setattr(sparse_linear, "_choice_of_shape", lambda *shape: KernelChoice(sparse=True))
    folder = tmp_path / "dense"
    config, tensors = write_llada(folder, d_model=256, n_heads=4, n_kv_heads=4, mlp_hidden_size=512)
    save_file(prune(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(folder, tmp_path / "sparse", to="sparse-24-bitmask")
    tokens = tokens_of(config)
    expected = logits(*load(folder, dtype="bfloat16"), tokens)
    model, vllm_config = load(tmp_path / "sparse", dtype="bfloat16")
    block = model.model.transformer.blocks[0]
    for layer in (block.qkv_proj, block.attn_out, block.ff_up_proj, block.ff_out):
        assert layer.weight.nbytes < 0.6 * 2 * layer.output_size * layer.input_size
    # Roundings to bfloat16 (8 bits) at each of 8 products, of logits of order 1.
    torch.testing.assert_close(logits(model, vllm_config, tokens), expected, rtol=5e-2, atol=1e-1)


def test_a_hostile_format_is_refused_by_its_name(pruned, tmp_path, load):
    folder, config = pruned
    block = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "os:system", "targets": ["Linear"]}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(Exception, match=r"sparsity_config\.format in config\.json is 'os:system'"):
        load(tmp_path)


GREEDY = """
import json, sys
from vllm import LLM, SamplingParams

options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "skip_tokenizer_init": True}
prompts = [{"prompt_token_ids": [start, 5, 9]} for start in (1, 20, 70)]
settings = SamplingParams(temperature=0, max_tokens=16, detokenize=False)
# An engine that is collected takes the process's parallel state with it.
engines = []
for folder in sys.argv[1:]:
    engines.append(LLM(model=folder, distributed_executor_backend="uni", num_gpu_blocks_override=16, **options))
    outputs = engines[-1].generate(prompts, settings, use_tqdm=False)
    print("tokens", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


def test_greedy_tokens_of_an_ordinary_model(tmp_path):
    """A stock architecture through the whole engine: dense, sparse and legacy give the same tokens.

    In a separate process with the older runner: the newer one's stock sampler has kernels that Triton's interpreter
    doesn't run, and vLLM chooses a runner once per process.
    """
    skip_without_vllm()
    folder = tmp_path / "dense"
    _, tensors = write_llama(folder)
    save_file(prune(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(folder, tmp_path / "sparse", to="sparse-bitmask")
    convert_checkpoint(folder, tmp_path / "legacy", to="sparse-24-bitmask", layout="legacy")
    environment = clean_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    if is_cpu_build():
        environment |= server_environment(diffusion=False) | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    folders = [str(tmp_path / name) for name in ("dense", "sparse", "legacy")]
    run = subprocess.run(
        [sys.executable, "-c", GREEDY, *folders], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line[7:]) for line in run.stdout.splitlines() if line.startswith("tokens ")]
    assert len(found) == 3
    assert found[0] == found[1] == found[2]
    assert len(set(map(tuple, found[0]))) == 3
