"""An engine in a process of its own: fresh memory statistics, environment and compile cache for each check."""

import json
import os
import random
import subprocess
import sys


def run_alone(code, *arguments, **environment):
    """A Python program in a process of its own, which prints one JSON object in a line, the last that isn't a log's."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Other ranks' processes may report their end after it.
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


# Options of the engine as JSON, prompts, tokens of each answer and options of each request: what comes of it.
SERVE = """
import json, sys, time
import torch
from sinkprune_plugin.devices import wait_for_device
from sinkprune_plugin.vllm.cpu import prepare
prepare()
from vllm import LLM, SamplingParams
model, engine, prompts, length, requests = sys.argv[1], *map(json.loads, sys.argv[2:])
started = time.perf_counter()
llm = LLM(model, **engine)
ready = time.perf_counter()
settings = [SamplingParams(max_tokens=length, ignore_eos=True, detokenize=False,
                           extra_args={f"dlm_{k}": v for k, v in each.items()}) for each in requests]
batch = [{"prompt_token_ids": prompt} for prompt in prompts]
llm.generate(batch, settings, use_tqdm=False)
wait_for_device(); begun = time.perf_counter()
outputs = llm.generate(batch, settings, use_tqdm=False)
wait_for_device(); taken = time.perf_counter() - begun
config = llm.llm_engine.vllm_config
print(json.dumps({
    "tokens": [list(output.outputs[0].token_ids) for output in outputs], "start_s": ready - started,
    "tokens_per_s": length * len(prompts) / taken,
    "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    "graphs": str(config.compilation_config.cudagraph_mode), "canvas": config.diffusion_config.canvas_length,
    "max_num_seqs": config.scheduler_config.max_num_seqs, "async": config.scheduler_config.async_scheduling}))
"""


def prompts_of(batch):
    """Prompts of 8 to 59 tokens, the same in each call."""
    rng = random.Random(0)
    return [[rng.randrange(5, 300) for _ in range(rng.randrange(8, 60))] for _ in range(batch)]


def serve(model, engine, requests, *, length=32, batch=8, **environment):
    prompts = prompts_of(batch)
    requests = [requests[number % len(requests)] for number in range(batch)]
    return run_alone(SERVE, model, *map(json.dumps, (engine, prompts, length, requests)), **environment)
