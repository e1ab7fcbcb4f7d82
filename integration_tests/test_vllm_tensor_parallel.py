"""Two tensor-parallel ranks as processes of one CPU: what each adds to the other's, in a network that has it all.

LLaDA2 has fused projections that are cut by heads, experts and a shared expert whose sum the ranks share once.
"""

import os

import pytest
import torch
from official_checkpoints import write_llada2
from vllm_engine import skip_without_vllm
from vllm_program import prompts_of, serve

from sinkprune_plugin.loading import load_model
from sinkprune_plugin.sampling import denoise

skip_without_vllm()
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_vllm_gpu.py does this on GPUs")
@pytest.mark.skipif(len(CORES) < 2, reason="vLLM's CPU build needs a core for each rank")
def test_two_ranks_write_what_one_model_writes(tmp_path):
    write_llada2(tmp_path, vocab_size=512, num_hidden_layers=3, head_dim=32, block_length=8, experts=[0, 8, 12],
                 max_position_embeddings=512)  # fmt: skip
    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 4,
              "tensor_parallel_size": 2, "diffusion_config": {"canvas_length": 32}, "skip_tokenizer_init": True,
              "kv_cache_memory_bytes": 50_000_000}  # fmt: skip
    # vLLM compiles the lookup in its divided table even here, for which Triton would need a backend.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": f"{CORES[0]}|{CORES[1]}", "TORCHDYNAMO_DISABLE": "1"}
    result = serve(tmp_path, engine, [{}, {"temperature": 0.8, "seed": 3}], length=13, batch=2, **environment)
    plain = load_model(tmp_path, torch.float32)
    for number, (prompt, tokens) in enumerate(zip(prompts_of(2), result["tokens"], strict=True)):
        options = {"temperature": 0.8, "seed": 3} if number % 2 else {}
        assert tokens == denoise(plain, torch.tensor(prompt), gen_length=13, **options).sequences[0].tolist()
