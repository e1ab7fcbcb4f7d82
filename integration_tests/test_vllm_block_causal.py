"""LLaDA2 in vLLM's engine: tokens equal those of the plain sampler one by one.

Its context is read block by block, each block a sequence of its own to the attention kernel, many in one forward pass.
"""

import pytest
import torch
from official_checkpoints import write_llada2
from vllm_engine import make_engine

from sinkprune_plugin.loading import load_model
from sinkprune_plugin.sampling import denoise

SIZES = {"head_dim": 32, "num_hidden_layers": 3, "block_length": 8, "max_position_embeddings": 512}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("block-causal")
    write_llada2(folder, **SIZES)
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    return make_engine(
        folder,
        skip_tokenizer_init=True,
        max_num_batched_tokens=72,
        max_num_seqs=16,
        diffusion_config={"canvas_length": 64},
    )


@pytest.fixture(scope="module")
def plain(folder):
    return load_model(folder, torch.float32)


def prompt_of(length, seed):
    return torch.randint(4, 88, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def params(max_tokens, stop=(), **options):
    from vllm import SamplingParams

    asked = {f"dlm_{name}": value for name, value in options.items()}
    return SamplingParams(
        max_tokens=max_tokens, stop_token_ids=list(stop), ignore_eos=True, detokenize=False, extra_args=asked
    )


def check(engine, plain, requests):
    """One batch in the engine against one call of the sampler for each request."""
    prompts = [{"prompt_token_ids": prompt} for prompt, _, _ in requests]
    outputs = engine.generate(prompts, [params(n, **o) for _, n, o in requests], use_tqdm=False)
    for (prompt, max_tokens, options), output in zip(requests, outputs, strict=True):
        options = dict(options)
        stop = options.pop("stop", None)
        expected = denoise(plain, torch.tensor(prompt), gen_length=max_tokens, eos_token_ids=stop, **options)
        tokens = list(output.outputs[0].token_ids)
        assert tokens == expected.sequences[0].tolist(), (len(prompt), max_tokens, options)


SHAPES = {
    "shorter than a block": (3, 16, {}),
    "exactly a block": (8, 16, {}),
    "a block and a rest": (13, 24, {"steps": 6}),
    "several blocks": (64, 16, {}),
    "several blocks and a rest": (45, 21, {}),
    "a generation within the prompt's block": (17, 5, {}),
    "one token": (1, 8, {}),
    "longer than max_num_batched_tokens": (190, 32, {}),
    "smaller blocks": (33, 16, {"block_length": 4}),
    "threshold": (19, 16, {"threshold": 0.2}),
    "margin": (40, 32, {"threshold": 0.05, "remasking": "margin"}),
    "sampled": (12, 24, {"temperature": 0.9, "seed": 7}),
    "an end": (30, 40, {"stop": (11, 23, 42)}),
    "an early stop": (21, 32, {"early_stop": True, "stop": (5, 6, 7, 8)}),
    "factor": (63, 17, {"factor": 1.2}),
}


def test_tokens_equal_those_of_the_plain_sampler_in_one_mixed_batch(engine, plain):
    check(engine, plain, [(prompt_of(shape[0], seed), *shape[1:]) for seed, shape in enumerate(SHAPES.values())])
