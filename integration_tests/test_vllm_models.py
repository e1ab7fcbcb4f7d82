"""The vLLM modules compute what the transformers classes compute, and sparse checkpoints load as the dense ones do.

Models are built and loaded by vLLM's own loader; attention, which needs an engine's cache, is replaced by torch's.
"""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from vllm_engine import clean_environment, free_port, prepare_vllm, skip_without_vllm

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import bitmask, convert_checkpoint, save_sparse_checkpoint
from sinkprune_plugin.models.dream.modeling_dream import DreamModel
from sinkprune_plugin.models.llada.configuration_llada import LLaDAConfig
from sinkprune_plugin.models.llada.modeling_llada import LLaDAModelLM
from sinkprune_plugin.models.rotary import RotaryTables, apply_rotary
from sinkprune_plugin.vllm.cpu import is_cpu_build, server_environment

OFFICIAL = runpy.run_path(str(Path(__file__).parent.parent / "tests" / "official_checkpoints.py"))
write_llada, write_dream = OFFICIAL["write_llada"], OFFICIAL["write_dream"]

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


@pytest.fixture(scope="module")
def load():
    """Function that loads a checkpoint with vLLM's loader, as a worker does."""
    prepare_vllm()
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    def load(path, **options):
        settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "skip_tokenizer_init": True}
        config = EngineArgs(model=str(path), **(settings | options)).create_engine_config()
        with set_current_vllm_config(config):
            # Does nothing if another test of this process has done it.
            address = f"tcp://127.0.0.1:{free_port()}"
            parallel_state.init_distributed_environment(1, 0, address, backend="gloo", local_rank=0)
            parallel_state.ensure_model_parallel_initialized(1, 1)
            return get_model(vllm_config=config), config

    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            # As vLLM's own CPU worker does: the loader calls it on every device.
            patch.setattr(torch.accelerator, "empty_cache", lambda: None)
        yield load


@pytest.fixture
def logits(monkeypatch):
    """Function (model, its configuration, tokens) → logits, with attention over the tokens of one request."""
    prepare_vllm()
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.attention import Attention

    def attend(self, query, key, value, output_shape=None, output_dtype=None):
        q, k, v = (
            x.reshape(len(x), heads, self.head_size).transpose(0, 1)
            for x, heads in ((query, self.num_heads), (key, self.num_kv_heads), (value, self.num_kv_heads))
        )
        k, v = (x.repeat_interleave(self.num_heads // self.num_kv_heads, dim=0) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=self.impl.scale).transpose(0, 1).flatten(1)

    monkeypatch.setattr(Attention, "forward", attend)

    @torch.inference_mode()
    def run(model, config, tokens):
        with set_current_vllm_config(config), set_forward_context(None, config):
            tokens = tokens.to(next(model.parameters()).device)
            hidden = model(input_ids=tokens, positions=torch.arange(len(tokens), device=tokens.device))
            return model.compute_logits(hidden).cpu()

    return run


def tokens_of(config, count=40):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, config["vocab_size"], (count,), generator=generator)


def check_same_logits(native_class, folder, config, load, logits):
    tokens = tokens_of(config)
    with torch.no_grad():
        expected = native_class.from_pretrained(folder, dtype=torch.float32)(tokens[None]).logits[0]
    found = logits(*load(folder), tokens)
    # float32 sums in another order (fused projections, another attention kernel); the logits are of order 1.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.abs().max() > 0.5
    return found


# --- registration


def test_registering_again_changes_nothing(tmp_path):
    prepare_vllm()
    from vllm.model_executor.layers import quantization
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from sinkprune_plugin.vllm.register import register

    register()
    loading, methods = DefaultModelLoader.get_all_weights, list(quantization.QUANTIZATION_METHODS)
    register()
    assert DefaultModelLoader.get_all_weights is loading
    assert methods == quantization.QUANTIZATION_METHODS
    # What vLLM needs on the class stays out of the files.
    config = LLaDAConfig()
    assert config.canvas_length
    config.save_pretrained(tmp_path)
    assert "canvas_length" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("version", "tested"),
    [("0.32.0", True), ("0.32.1", True), ("0.32.0+cpu", True), ("0.33.0", False), ("0.31.2", False), ("1.32.0", False),
     ("0.32rc1", False), ("dev", False)],
)  # fmt: skip
def test_versions_of_vllm_that_were_tested(version, tested):
    from sinkprune_plugin.vllm.register import is_tested

    assert is_tested(version) is tested


# --- the models


LLADAS = {
    "official": {},
    "grouped queries": {"n_kv_heads": 2},
    "biases": {"include_bias": True, "bias_for_layer_norm": True},
    "QKV biases": {"include_qkv_bias": True},
    "norms without weights": {"layer_norm_with_affine": False},
    "tied": {"weight_tying": True},
    "tied with biases": {"weight_tying": True, "include_bias": True},
    "gelu": {"activation_type": "gelu"},
    "relu": {"activation_type": "relu"},
    "no padded rows": {"embedding_size": 90},
    "rotated in the model's dtype": {"rope_full_precision": False},
}


@pytest.mark.parametrize("name", LLADAS)
def test_llada_gives_the_logits_of_the_plain_model(name, tmp_path, load, logits):
    config, _ = write_llada(tmp_path, **LLADAS[name])
    found = check_same_logits(LLaDAModelLM, tmp_path, config, load, logits)
    # Padded rows of the embedding are valid tokens.
    assert found.shape[1] == config["embedding_size"]


@pytest.mark.parametrize("architecture", ["MMadaModelLM", "MMaDAModelLM"])
def test_mmada_gives_the_logits_of_the_plain_model(architecture, tmp_path, load, logits):
    config, _ = write_llada(tmp_path, model_type="mmada", architectures=[architecture])
    check_same_logits(LLaDAModelLM, tmp_path, config, load, logits)


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 7}, {"tie_word_embeddings": True}, {"hidden_act": "gelu_pytorch_tanh"},
     {"hidden_act": "relu2"}],
    ids=["official", "all heads", "tied", "gelu", "an activation without kernel"],
)  # fmt: skip
def test_dream_gives_the_logits_of_the_plain_model(changes, tmp_path, load, logits):
    config, _ = write_dream(tmp_path, **changes)
    check_same_logits(DreamModel, tmp_path, config, load, logits)


def test_bfloat16_rounds_as_the_native_class(tmp_path, load, logits):
    """Norms and rotary embedding in float32, everything else in bfloat16: the two differ by roundings, no more than the
    native class differs from itself in float32."""
    torch.cpu._init_amx()
    config, _ = write_llada(tmp_path, d_model=96, n_layers=3)
    tokens = tokens_of(config)
    with torch.no_grad():
        exact, expected = (
            LLaDAModelLM.from_pretrained(tmp_path, dtype=dtype)(tokens[None]).logits[0].float()
            for dtype in (torch.float32, torch.bfloat16)
        )
    found = logits(*load(tmp_path, dtype="bfloat16"), tokens).float()
    own = (expected - exact).square().mean().sqrt()
    assert (found - exact).square().mean().sqrt() < 1.25 * own
    assert own < 0.05


def test_rotary_embedding_in_bfloat16(tmp_path, load, monkeypatch):
    """LLaDA rotates in float32 whatever the model's dtype."""
    prepare_vllm()
    from vllm.model_executor.layers.attention import Attention

    write_llada(tmp_path)
    model, _ = load(tmp_path, dtype="bfloat16")
    monkeypatch.setattr(Attention, "forward", lambda self, q, k, v: torch.cat([q, k, v], dim=-1))
    attn = model.model.transformer.blocks[0].attn
    positions = torch.randperm(64)
    qkv = torch.randn(64, 3 * 48, dtype=torch.bfloat16)
    device = attn.rotary.cos_sin_cache.device
    found = attn.attend(positions.to(device), qkv.clone().to(device)).cpu()

    q, k, v = (x.unflatten(-1, (6, 8)).transpose(0, 1)[None] for x in qkv.split(48, dim=-1))
    cos, sin = RotaryTables(8, 500000.0, full_precision=True)(qkv[None], positions[None])
    expected = torch.cat(
        [x[0].transpose(0, 1).flatten(1) for x in (apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v)], dim=-1
    )
    # Another order of the same three float32 operations; rarely it is the difference between two neighbours in
    # bfloat16. Rotated in bfloat16, every eighth element would differ.
    assert (found == expected).float().mean() > 0.999
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-3)


def test_rows_of_a_step(tmp_path, load, logits):
    """Logits of the rows that can be unmasked only, and hidden states moved by what the model state hands over."""
    config, _ = write_llada(tmp_path)
    model, vllm_config = load(tmp_path)
    tokens = tokens_of(config)
    everything = logits(model, vllm_config, tokens)
    device = next(model.parameters()).device
    model.block_rows = torch.tensor([3, 7, 39], device=device)
    torch.testing.assert_close(logits(model, vllm_config, tokens), everything[[3, 7, 39]])
    from vllm.forward_context import set_forward_context

    with torch.inference_mode(), set_forward_context(None, vllm_config):
        tokens, positions = tokens.to(device), torch.arange(len(tokens), device=device)
        plain = model(tokens, positions)
        moved = model(tokens, positions, shift=lambda hidden: hidden.roll(1, 0))
        embedded = model(None, positions, inputs_embeds=model.embed_input_ids(tokens))
    assert torch.equal(moved, plain.roll(1, 0))
    assert torch.equal(embedded, plain)


@pytest.mark.parametrize(("write", "layer"), [(write_llada, "blocks"), (write_dream, "layers")])
def test_every_parameter_comes_from_the_checkpoint(write, layer, tmp_path, load):
    _, tensors = write(tmp_path)
    model, _ = load(tmp_path, load_format="dummy")
    assert model.checkpoint_names() == set(tensors)
    assert any(f".{layer}.1." in name for name in tensors)


def test_a_missing_weight_is_refused(tmp_path, load):
    write_llada(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.transformer.blocks.1.k_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"^model\.transformer\.blocks\.1\.k_proj\.weight is in no file"):
        load(tmp_path)


def test_a_bias_without_place_is_refused(tmp_path, load):
    write_llada(tmp_path, include_qkv_bias=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"include_qkv_bias": False}))
    with pytest.raises(UsageError, match=r"k_proj\.bias is in the checkpoint"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("write", "changes", "option"),
    [(write_llada, {"alibi": True}, "alibi"), (write_llada, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
      "rope_scaling"), (write_dream, {"use_sliding_window": True, "sliding_window": 32}, "use_sliding_window")],
)  # fmt: skip
def test_options_that_are_not_computed(write, changes, option, tmp_path, load):
    write(tmp_path, **changes)
    with pytest.raises(UsageError, match=f"^{option}="):
        load(tmp_path)


# --- sparse checkpoints


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


WRITE = {"llada": write_llada, "dream": write_dream, "llama": write_llama}
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
    """Each kind of part in a file of its own, and the oldest layout: full names, under ``compression_config``."""
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
    with pytest.raises(UsageError, match=rf"^{owner}\.weight: {owner}\.bitmask, .* is in no file"):
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

    if not sparse_linear.sparse_tensor_cores():
        pytest.skip("needs compute capability 8.0 and cuSPARSELt")
    monkeypatch.setattr(sparse_linear, "_worth_it", lambda *shape: True)
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

    In a process of its own with the older runner: the newer one's stock sampler has kernels that Triton's interpreter
    doesn't run, and vLLM settles on a runner once for a process.
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
