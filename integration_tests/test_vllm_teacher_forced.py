"""The logits of every step in the engine, against a plain forward pass on the same canvas.

Tokens that agree say little about logits in bfloat16, where a near tie sends a generation elsewhere. Here the plain
model is given the engine's own canvas before each step, in every cache; on a GPU also with CUDA graphs, in bfloat16 and
in FP8. Beside tiny-llada, a random model with the heads and the vocabulary of LLaDA-8B; on a GPU with its widths too.
"""

import os

import pytest
import torch
from sampling_references import plain_cached_logits, plain_logits
from step_recorder import Recorder
from vllm_engine import make_engine
from vllm_program import serve

from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model
from sinkprune_plugin.models.decoder_blocks import block_linears
from sinkprune_plugin.sampling.batch_table import Column

GPU = torch.cuda.is_available()
CACHES = ("none", "prefix", "dual", "commit")
PROMPT, GENERATION, BLOCK = 11, 24, 8


def record(engine, prompt, cache):
    from vllm import SamplingParams

    extra = {"dlm_block_length": BLOCK, "dlm_steps": GENERATION // 2, "dlm_cache": cache}
    settings = SamplingParams(max_tokens=GENERATION, ignore_eos=True, detokenize=False, extra_args=extra)
    with Recorder(engine) as recorder:
        (output,) = engine.generate([{"prompt_token_ids": prompt}], settings, use_tqdm=False)
    return list(output.outputs[0].token_ids), [step for step in recorder.steps if step[3] is not None]


@torch.no_grad()
def expected_logits(model, prompt, tokens, steps, cache):
    """The plain model's logits for the rows of each step."""
    device = next(model.parameters()).device
    logits_of = plain_logits(model) if cache == "none" else plain_cached_logits(model, cache, len(prompt))
    logits_of.prompt_length = len(prompt)
    seen, step, results = None, 0, []
    for line, canvas, columns, _ in steps:
        begin = int(line[Column.START])
        done = begin - len(prompt)
        # Finished blocks as they were emitted, then the open block and the masks behind it.
        x = torch.tensor([*prompt, *tokens[:done], *canvas[: GENERATION - done].tolist()])[None]
        step = 0 if begin != seen else step + 1
        seen = begin
        logits = logits_of(x.to(device), begin, begin + int(line[Column.WIDTH]), step)
        results.append(logits[0, begin + columns].float().cpu())
    return results


@pytest.fixture(scope="module")
def eight_billion(tmp_path_factory):
    """Two layers with heads of 128 and LLaDA-8B's vocabulary, random; its other widths where there is a GPU."""
    from sinkprune_plugin.models.llada.configuration_llada import LLaDAConfig
    from sinkprune_plugin.models.llada.modeling_llada import LLaDAModelLM

    width, inner = (4096, 12_288) if GPU else (256, 768)
    torch.manual_seed(0)
    with torch.device("cuda" if GPU else "cpu"):
        model = LLaDAModelLM(
            LLaDAConfig(
                vocab_size=126_464,
                embedding_size=126_464,
                d_model=width,
                n_layers=2,
                n_heads=width // 128,
                mlp_hidden_size=inner,
                max_sequence_length=4096,
                mask_token_id=126_336,
                eos_token_id=126_081,
                pad_token_id=126_081,
                architectures=["LLaDAModelLM"],
            )
        )
    assert model.config.head_dim == 128
    folder = tmp_path_factory.mktemp("eight-billion")
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


ENGINES = [
    (model, dtype, graphs)
    for model in ("tiny-llada", "LLaDA-8B's geometry")
    for dtype, graphs in (
        ("float32", False),
        ("float32", True),
        ("bfloat16", False),
        ("bfloat16", True),
        ("fp8", False),
    )
]


@pytest.fixture(scope="module", params=ENGINES, ids=lambda each: ", ".join(map(str, each)))
def engine(request):
    name, dtype, graphs = request.param
    if not GPU and (dtype != "float32" or graphs):
        pytest.skip("needs a CUDA device")
    folder = EMBEDDED_MODEL if name == "tiny-llada" else request.getfixturevalue("eight_billion")
    if dtype == "float32":
        # Otherwise Triton's attention takes products of float32 in TF32, which has 10 bits.
        os.environ["TRITON_F32_DEFAULT"] = "ieee"
    options = {"compilation_config": {"cudagraph_mode": "PIECEWISE"}, "enforce_eager": False} if graphs else {}
    if GPU:
        # Engines stay until the process ends: 47 GB for all ten of them, counted from the weights.
        room = {"tiny-llada": 2.5e9}.get(name, 9e9 if dtype == "float32" else 5.5e9)
        options["gpu_memory_utilization"] = room / torch.cuda.get_device_properties(0).total_memory
    if dtype == "fp8":
        options["quantization"] = "fp8"
    try:
        precision = "float32" if dtype == "float32" else "bfloat16"
        return dtype, folder, make_engine(folder, dtype=precision, skip_tokenizer_init=True, **options)
    finally:
        os.environ.pop("TRITON_F32_DEFAULT", None)


def to_fp8(x):
    """Nearest values that e4m3 has, with one scale for the tensor."""
    scale = x.abs().max().float() / torch.finfo(torch.float8_e4m3fn).max
    return ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


def rounded_model(folder, dtype):
    """The plain model in the engine's precision; for FP8 with weights and inputs of the blocks' Linears rounded."""
    model = load_model(folder, torch.bfloat16)
    if dtype == "fp8":
        for module in block_linears(model).values():
            module.weight.data = to_fp8(module.weight.data)
            module.register_forward_pre_hook(lambda _, inputs: (to_fp8(inputs[0]), *inputs[1:]))
    return model


@pytest.mark.parametrize("cache", CACHES)
def test_logits_of_every_step(cache, engine, measured):
    dtype, folder, llm = engine
    prompt = [5 + 37 * number % 300 for number in range(PROMPT)]
    tokens, steps = record(llm, prompt, cache)
    assert len(steps) == GENERATION // 2
    # Only what is masked, fewer from step to step.
    assert [len(step[3]) for step in steps] == [8, 6, 4, 2] * 3
    device = "cuda" if GPU else "cpu"
    exact = expected_logits(load_model(folder, torch.float32).to(device), prompt, tokens, steps, cache)
    distance = max(float((step[3] - logits).abs().max()) for step, logits in zip(steps, exact, strict=True))
    scale = float(torch.cat(exact).std())
    if dtype == "float32":
        # Sums of float32 in another order, in at most six layers and over at most 12288 terms; 2^-24 each.
        limit = 2e-4 * scale
    else:
        # As far from float32 as the plain model with the same rounding is, give or take: other kernels round in other
        # places.
        rounded = expected_logits(rounded_model(folder, dtype).to(device), prompt, tokens, steps, cache)
        limit = 3 * max(float((one - other).abs().max()) for one, other in zip(rounded, exact, strict=True))
    measured |= {"largest difference": distance, "limit": limit, "standard deviation": scale}
    assert distance <= limit


def test_the_rounding_to_fp8_is_that_of_the_format():
    """e4m3 keeps 4 significant bits: powers of two stay, and nothing moves by more than a sixteenth of itself."""
    values = torch.linspace(-448, 448, 897)
    rounded = to_fp8(values)
    assert torch.equal(to_fp8(rounded), rounded)
    assert float(((rounded - values).abs() / values.abs().clamp(min=1)).max()) == pytest.approx(1 / 17)
    # Halfway between 16 and 18: to the even one.
    assert float(rounded[values == 17]) == 16


@pytest.mark.skipif(GPU, reason="test_vllm_gpu.py does this on a GPU")
def test_the_program_of_the_gpu_checks_runs():
    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 2}
    result = serve(EMBEDDED_MODEL, engine, [{"cache": "dual"}, {}], length=4, batch=2)
    assert [len(tokens) for tokens in result["tokens"]] == [4, 4]
    assert result["tokens_per_s"] > 0
    assert result["max_num_seqs"] == 2
