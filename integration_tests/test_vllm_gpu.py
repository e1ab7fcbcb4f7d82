"""What only a GPU can show (`make test-gpu`): exactness there, bfloat16, CUDA graphs, sparse tensor cores, speed."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sparse_models import prune_2_of_4
from unequal_blocks import make_unequal
from vllm_engine import make_engine
from vllm_program import serve

from sinkprune_plugin.formats import convert_checkpoint
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.sampling import denoise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).parent.parent
CACHES = ("none", "prefix", "dual", "commit")


def requests(count):
    rng = random.Random(0)
    prompts = [[rng.randrange(5, 400) for _ in range(rng.randrange(1, 60))] for _ in range(count)]
    options = [{"cache": CACHES[number % 4], "block_length": 16, "steps": 16} for number in range(count)]
    return prompts, options


def generate(engine, prompts, options, max_tokens=32):
    from vllm import SamplingParams

    settings = [
        SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args={f"dlm_{k}": v for k, v in each.items()})
        for each in options
    ]
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def agreement(first, second):
    pairs = [(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("unequal", [False, True], ids=["equal blocks", "blocks of different sizes"])
def test_float32_equals_the_plain_sampler(unequal, tmp_path):
    prompts, options = requests(16)
    folder, model = EMBEDDED_MODEL, load_model(EMBEDDED_MODEL, torch.float32)
    if unequal:
        folder = tmp_path
        make_unequal(model).save_pretrained(folder)
        load_tokenizer(EMBEDDED_MODEL).save_pretrained(folder)
    found = generate(make_engine(folder), prompts, options)
    model = model.cuda()
    expected = [
        denoise(model, torch.tensor(prompt), gen_length=32, **option).sequences[0].tolist()
        for prompt, option in zip(prompts, options, strict=True)
    ]
    # TF32 is off by default; other kernels' orders of sums may still let a near-tie fall differently in one request.
    assert agreement(found, expected) >= 0.97


def test_bfloat16_with_cuda_graphs_equals_bfloat16_without():
    """Piecewise graphs replay the same kernels on the same shapes, padded; FULL is replaced by them."""
    prompts, options = requests(16)
    eager = generate(make_engine(EMBEDDED_MODEL, dtype="bfloat16"), prompts, options)
    graphs = make_engine(
        EMBEDDED_MODEL,
        dtype="bfloat16",
        enforce_eager=False,
        compilation_config={"cudagraph_mode": "FULL_AND_PIECEWISE"},
    )
    mode = graphs.llm_engine.vllm_config.compilation_config.cudagraph_mode
    assert not mode.has_full_cudagraphs()
    # torch.compile fuses norms and rotary embedding, which rounds bfloat16 elsewhere: a random pair agrees in 2 %.
    assert agreement(eager, generate(graphs, prompts, options)) >= 0.5


def test_sparse_tensor_cores_against_dense(tmp_path):
    model = load_model(EMBEDDED_MODEL, torch.bfloat16)
    prune_2_of_4(model)
    model.save_pretrained(tmp_path / "dense")
    load_tokenizer(EMBEDDED_MODEL).save_pretrained(tmp_path / "dense")
    convert_checkpoint(tmp_path / "dense", tmp_path / "sparse", "sparse-24-bitmask", progress=False)
    prompts, options = requests(8)
    tokens = [
        generate(make_engine(tmp_path / name, dtype="bfloat16"), prompts, options) for name in ("dense", "sparse")
    ]
    # Equal where no shape was found faster sparse; otherwise another order of bfloat16 sums.
    assert agreement(*tokens) >= 0.5


def test_throughput_script():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "serving.py"), "--rounds", "1", "--only", "tiny"],
        capture_output=True,
        text=True,
        timeout=580,
        env=os.environ | {"VLLM_NO_USAGE_STATS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    assert {row["side"] for row in summary["rows"]} == {"plain loop", *CACHES}
    assert [row["weights"] for row in summary["gpu_2of4"]] == ["dense", "sparse"]


def kept(result, measured, name):
    measured[name] = {key: value for key, value in result.items() if key != "tokens"}
    return result["tokens"]


def test_default_configuration_in_every_cache(measured):
    """No option of the engine but the dtype: graphs, canvas and batch are what a user gets. A block of the whole canvas
    makes all queries of a step equally wide, which is what full graphs would have been taken for."""
    for cache in CACHES:
        every = {"cache": cache, "block_length": 64, "steps": 32}
        result = serve(
            EMBEDDED_MODEL, {"dtype": "bfloat16", "diffusion_config": {"canvas_length": 64}}, [every], length=64
        )
        assert result["canvas"] == 64
        assert "FULL" not in result["graphs"]
        default = serve(EMBEDDED_MODEL, {"dtype": "bfloat16"}, [every | {"block_length": 32}], length=64)
        for name, found in (("canvas = max_tokens", result), ("default", default)):
            tokens = kept(found, measured, f"{cache}, {name}")
            assert all(len(answer) == 64 for answer in tokens)


def test_the_engine_never_waits_for_the_device():
    """vLLM raises where the host waits in the middle of a step."""
    options = [{"cache": cache, "block_length": 16, "temperature": 0.5 * number} for number, cache in enumerate(CACHES)]
    result = serve(EMBEDDED_MODEL, {"dtype": "bfloat16"}, options, VLLM_GPU_SYNC_CHECK="error")
    assert all(len(answer) == 32 for answer in result["tokens"])


def test_two_starts_with_one_compile_cache(tmp_path, measured):
    options = [{"block_length": 16, "cache": cache} for cache in CACHES]
    runs = [serve(EMBEDDED_MODEL, {"dtype": "bfloat16"}, options, VLLM_CACHE_ROOT=str(tmp_path)) for _ in range(2)]
    first, second = (kept(run, measured, f"start {number + 1}") for number, run in enumerate(runs))
    assert first == second


def eight_billion(folder, layers, changes=None):
    """LLaDA-8B with fewer layers and random weights: widths, heads of 128 and vocabulary are its own."""
    from sinkprune_plugin.models.llada.configuration_llada import LLaDAConfig
    from sinkprune_plugin.models.llada.modeling_llada import LLaDAModelLM

    torch.manual_seed(0)
    config = LLaDAConfig(
        vocab_size=126_464,
        embedding_size=126_464,
        d_model=4096,
        n_layers=layers,
        n_heads=32,
        mlp_hidden_size=12_288,
        max_sequence_length=4096,
        mask_token_id=126_336,
        eos_token_id=126_081,
        pad_token_id=126_081,
        architectures=["LLaDAModelLM"],
        **(changes or {}),
    )
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LLaDAModelLM(config)
        finally:
            torch.set_default_dtype(torch.float32)
    if folder is not None:
        model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Four layers of LLaDA-8B dense, 2:4 and with a third fewer MLP channels."""
    from sinkprune_plugin.models.decoder_blocks import block_linears

    root = tmp_path_factory.mktemp("large")
    model = eight_billion(root / "dense", 4)
    for module in block_linears(model).values():
        groups = module.weight.data.view(-1, 4)
        module.weight.data = groups.scatter(1, groups.float().abs().topk(2, largest=False).indices, 0).view(
            module.weight.shape
        )
    model.save_pretrained(root / "two_of_four")
    del model
    torch.cuda.empty_cache()
    convert_checkpoint(root / "two_of_four", root / "sparse", "sparse-24-bitmask", progress=False)
    eight_billion(root / "structured", 4, {"mlp_hidden_size": 8192})
    torch.cuda.empty_cache()
    return root


def test_tokens_per_second_with_the_geometry_of_eight_billion(large, measured):
    engine = {"dtype": "bfloat16", "skip_tokenizer_init": True, "gpu_memory_utilization": 0.5}
    for cache in CACHES:
        for kind in ("dense", "two_of_four", "sparse", "structured"):
            options = [{"cache": cache, "block_length": 32, "steps": 64}]
            tokens = kept(serve(large / kind, engine, options, length=128, batch=32), measured, f"{cache}, {kind}")
            assert all(len(answer) == 128 for answer in tokens)


def test_peak_memory_at_defaults(tmp_path, measured):
    """All 32 layers, weights that are never read from disk; everything else as vLLM sets it."""
    folder = tmp_path / "config"
    eight_billion(None, 1).config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_layers": 32}))
    engine = {"dtype": "bfloat16", "skip_tokenizer_init": True, "load_format": "dummy"}
    result = serve(folder, engine, [{"block_length": 32, "steps": 32}], length=128, batch=32)
    assert all(len(answer) == 128 for answer in kept(result, measured, "LLaDA-8B"))
    assert result["peak_bytes"] <= 0.95 * torch.cuda.get_device_properties(0).total_memory


def test_fp8(large, measured):
    engine = {"dtype": "bfloat16", "skip_tokenizer_init": True, "gpu_memory_utilization": 0.5, "quantization": "fp8"}
    tokens = kept(serve(large / "dense", engine, [{"block_length": 32}], length=64), measured, "fp8")
    assert all(len(answer) == 64 for answer in tokens)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_give_the_tokens_of_one(measured):
    options = [{"block_length": 16, "cache": cache} for cache in CACHES]
    runs = [
        serve(EMBEDDED_MODEL, {"dtype": "float32", "tensor_parallel_size": size}, options, TRITON_F32_DEFAULT="ieee")
        for size in (1, 2)
    ]
    one, two = (kept(run, measured, f"{number + 1} GPU") for number, run in enumerate(runs))
    # Partial sums are added in another order; float32.
    assert agreement(one, two) >= 0.97


def test_preemption_on_a_gpu():
    """Room for two of eight requests: as in test_vllm_exactness, which compares tokens with the plain sampler's."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "integration_tests/test_vllm_exactness.py", "-k", "preempt"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout[-3000:]
