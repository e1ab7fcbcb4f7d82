"""A model that denoises block by block in vLLM's engine: tokens equal those of the plain sampler one by one.

Its context is causal and an open block isn't, so requests of one step differ in how their tokens see each other.
"""

import pytest
import torch
from block_requests import check, check_preempted, params, prompt_of
from nemotron_labs_checkpoints import write_nemotron_labs
from vllm_engine import make_engine

from sinkprune_plugin.loading import load_model

SIZES = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "block_size": 8,
         "max_position_embeddings": 256}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocks")
    write_nemotron_labs(folder, **SIZES)
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    return make_engine(folder, skip_tokenizer_init=True)


@pytest.fixture(scope="module")
def plain(folder):
    return load_model(folder, torch.float32)


def test_tokens_equal_those_of_the_plain_sampler_in_one_mixed_batch(engine, plain):
    shapes = [
        # prompt, max_tokens, options
        (1, 8, {}),
        (70, 32, {}),
        (17, 24, {"steps": 6}),
        (33, 16, {"block_length": 4}),
        (5, 20, {}),
        (8, 16, {"threshold": 0.2}),
        (40, 32, {"threshold": 0.05, "remasking": "margin"}),
        (12, 24, {"temperature": 0.9, "seed": 7}),
        (30, 40, {"stop": (11, 23, 42)}),
        (21, 32, {"early_stop": True, "stop": (5, 6, 7, 8)}),
        (64, 16, {"factor": 1.2}),
    ]
    requests = [(prompt_of(length, seed), wanted, options) for seed, (length, wanted, options) in enumerate(shapes)]
    check(engine, plain, requests)


def test_a_request_that_is_preempted_reads_its_blocks_again(engine, plain):
    """Its prompt and finished blocks are read causally then, as they were at first."""
    check_preempted(engine, plain, [(prompt_of(20 + number, 50 + number), 32) for number in range(3)])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache": "none"}, "dlm_cache none isn't what a nemotron_labs model computes"),
        ({"cache": "prefix"}, "dlm_cache prefix isn't"),
        ({"block_length": 16}, "dlm_block_length 16 is longer than the 8 tokens"),
        ({"cfg_scale": 1.0}, "dlm_cfg_scale 1.0 isn't supported for a nemotron_labs model"),
    ],
)
def test_what_the_model_was_not_trained_for_is_refused(engine, options, words):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=words):
        engine.generate([{"prompt_token_ids": [5, 6]}], [params(16, **options)], use_tqdm=False)
