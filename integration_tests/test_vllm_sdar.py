"""SDAR in vLLM's engine, whose context is read like LLaDA2's (test_vllm_block_causal.py), in blocks of 4."""

import pytest
import torch
from block_requests import check, prompt_of
from sdar_checkpoints import write_sdar
from test_vllm_block_causal import SHAPES
from vllm_engine import make_engine

from sinkprune_plugin.loading import load_model

# Options of which a block of 4 is too short for the case.
SHORT = {name: shape for name, shape in SHAPES.items() if name != "smaller blocks"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdar")
    write_sdar(folder, head_dim=32, max_position_embeddings=512)
    return folder


def test_tokens_equal_those_of_the_plain_sampler_in_one_mixed_batch(folder):
    engine = make_engine(
        folder,
        skip_tokenizer_init=True,
        max_num_batched_tokens=72,
        max_num_seqs=16,
        diffusion_config={"canvas_length": 64},
    )
    requests = [(prompt_of(shape[0], seed), *shape[1:]) for seed, shape in enumerate(SHORT.values())]
    check(engine, load_model(folder, torch.float32), [*requests, (prompt_of(33, 99), 16, {"block_length": 2})])
