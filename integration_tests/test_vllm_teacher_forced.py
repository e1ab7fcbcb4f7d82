"""The logits of every step in the engine, against a plain forward pass on the same canvas.

Tokens that agree say little about logits in bfloat16, where a near tie sends a generation elsewhere. Here the plain
model is given the engine's own canvas before each step, in every cache; on a GPU also with CUDA graphs, and in float32.
"""

import os

import pytest
import torch
from sampling_references import plain_cached_logits, plain_logits
from vllm_engine import make_engine
from vllm_program import serve

from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model
from sinkprune_plugin.sampling.batch_table import Column

GPU = torch.cuda.is_available()
CACHES = ("none", "prefix", "dual", "commit")
PROMPT, GENERATION, BLOCK = 11, 24, 8


class Recorder:
    """Keeps what the sampler of an engine projects: (table line, canvas, columns, logits) of each step of one request.

    :param engine: an engine in this process
    """

    def __init__(self, engine):
        core = engine.llm_engine.engine_core.engine_core
        self.batched = core.model_executor.driver_worker.worker.model_runner.sampler.batched
        self.steps = []

    def __enter__(self):
        sampler, head = self.batched, self.batched._head
        self.head = head

        def gather(hidden, before, batch):
            line = batch.table[0].cpu()
            slot, rows = int(line[Column.SLOT]), int(line[Column.ROWS])
            columns = sampler.state.order[slot, :rows].long().cpu()
            self.steps.append([line, sampler.state.canvas[slot].cpu().clone(), columns, None])
            return type(sampler).gather(sampler, hidden, before, batch)

        def recording(hidden):
            logits = head(hidden)
            self.steps[-1][3] = logits.float().cpu().clone()
            return logits

        sampler.gather, sampler._head = gather, recording
        return self

    def __exit__(self, *_):
        del self.batched.gather
        self.batched._head = self.head


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


@pytest.fixture(scope="module", params=[(p, g) for p in ("float32", "bfloat16") for g in (False, True)], ids=str)
def engine(request):
    dtype, graphs = request.param
    if not GPU and (dtype != "float32" or graphs):
        pytest.skip("needs a CUDA device")
    if dtype == "float32":
        # Otherwise Triton's attention takes products of float32 in TF32, which has 10 bits.
        os.environ["TRITON_F32_DEFAULT"] = "ieee"
    options = {"compilation_config": {"cudagraph_mode": "PIECEWISE"}, "enforce_eager": False} if graphs else {}
    try:
        return dtype, make_engine(EMBEDDED_MODEL, dtype=dtype, **options)
    finally:
        os.environ.pop("TRITON_F32_DEFAULT", None)


@pytest.mark.parametrize("cache", CACHES)
def test_logits_of_every_step(cache, engine, measured):
    dtype, llm = engine
    prompt = [5 + 37 * number % 300 for number in range(PROMPT)]
    tokens, steps = record(llm, prompt, cache)
    assert len(steps) == GENERATION // 2
    # Only what is masked, fewer from step to step.
    assert [len(step[3]) for step in steps] == [8, 6, 4, 2] * 3
    device = "cuda" if GPU else "cpu"
    exact = expected_logits(load_model(EMBEDDED_MODEL, torch.float32).to(device), prompt, tokens, steps, cache)
    distance = max(float((step[3] - logits).abs().max()) for step, logits in zip(steps, exact, strict=True))
    scale = float(torch.cat(exact).std())
    if dtype == "float32":
        # Sums of float32 in another order, in four layers of width 256; 2^-24 each.
        limit = 2e-4 * scale
    else:
        # As far from float32 as the plain model in bfloat16 is, give or take: other kernels round in other places.
        rounded = expected_logits(load_model(EMBEDDED_MODEL, torch.bfloat16).to(device), prompt, tokens, steps, cache)
        limit = 3 * max(float((one - other).abs().max()) for one, other in zip(rounded, exact, strict=True))
    measured |= {"largest difference": distance, "limit": limit, "standard deviation": scale}
    assert distance <= limit


@pytest.mark.skipif(GPU, reason="test_vllm_gpu.py does this on a GPU")
def test_the_program_of_the_gpu_checks_runs():
    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 2}
    result = serve(EMBEDDED_MODEL, engine, [{"cache": "dual"}, {}], length=4, batch=2)
    assert [len(tokens) for tokens in result["tokens"]] == [4, 4]
    assert result["tokens_per_s"] > 0
    assert result["max_num_seqs"] == 2
