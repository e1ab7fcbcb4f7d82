"""LLaDA2 in vLLM's engine: tokens equal those of the plain sampler one by one.

Its context is read block by block, each block a sequence of its own to the attention kernel, many in one forward pass.
"""

import pytest
import torch
from block_requests import check, check_preempted, params, prompt_of
from official_checkpoints import write_llada2
from step_recorder import Recorder
from vllm_engine import make_engine

from sinkprune_plugin.loading import load_model
from sinkprune_plugin.models.block_attention import context_mask
from sinkprune_plugin.sampling import denoise
from sinkprune_plugin.sampling.batch_table import Column
from sinkprune_plugin.verification.speed import Workload, vllm_sampler

# Official files name a window, which the official network doesn't read; this one would show.
SIZES = {
    "head_dim": 32,
    "num_hidden_layers": 3,
    "block_length": 8,
    "max_position_embeddings": 512,
    "sliding_window": 16,
}


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


@pytest.fixture
def scheduled(engine, monkeypatch):
    """The tokens of each request in each step that the scheduler hands out from here on."""
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    steps, schedule = [], scheduler.schedule

    def recording(*arguments):
        output = schedule(*arguments)
        if output.num_scheduled_tokens:
            steps.append({name.split("-")[0]: count for name, count in output.num_scheduled_tokens.items()})
        return output

    monkeypatch.setattr(scheduler, "schedule", recording)
    return steps


def test_a_prompt_that_fits_costs_no_forward_pass_of_its_own(engine, plain, scheduled):
    """45 tokens: five blocks and a rest of 5, which is in the first block that is denoised."""
    check(engine, plain, [(prompt_of(45, 1), 19, {"steps": 4})])
    # Three positions of the first block at 4 steps of 19 tokens have one step, the others one and two; each block but
    # the last is run once more.
    assert [sum(step.values()) for step in scheduled] == [48, 8, 8, 8, 8, 8, 8]


def test_a_long_prompt_is_read_in_chunks_of_whole_blocks(engine, plain, scheduled):
    check(engine, plain, [(prompt_of(190, 2), 2, {})])
    assert [sum(step.values()) for step in scheduled] == [72, 72, 48, 8]


def test_a_step_holds_at_most_max_num_batched_tokens(engine, plain, scheduled):
    requests = [(prompt_of(40 + 30 * number, 20 + number), 12, {}) for number in range(4)]
    check(engine, plain, requests)
    assert max(sum(step.values()) for step in scheduled) <= 72
    # Prompts are read while other requests denoise.
    assert any(max(step.values()) > 8 and 8 in step.values() for step in scheduled)


def test_a_request_that_is_preempted(engine, plain):
    """Its prompt and finished blocks are read again, at once, each block as it was at first."""
    check_preempted(engine, plain, [(prompt_of(19 + 9 * number, 50 + number), 32) for number in range(3)])


def cached(engine, prompt, max_tokens=9, **options):
    """Tokens of the answer, and how many of the prompt were found in the prefix cache."""
    (output,) = engine.generate([{"prompt_token_ids": prompt}], [params(max_tokens, **options)], use_tqdm=False)
    return list(output.outputs[0].token_ids), output.num_cached_tokens


def test_the_prefix_cache_gives_the_keys_of_whole_blocks(engine, plain):
    """A page has 128 positions, 16 blocks. The second half of the prompt differs; the answer is of both."""
    assert engine.llm_engine.vllm_config.cache_config.block_size == 128
    common = prompt_of(130, 90)
    for number, found in ((0, 0), (1, 128)):
        prompt = common + prompt_of(40, 91 + number)
        tokens, hits = cached(engine, prompt)
        assert (hits, tokens) == (found, denoise(plain, torch.tensor(prompt), gen_length=9).sequences[0].tolist())


def test_finished_blocks_of_an_answer_are_found_in_the_prefix_cache(engine, plain):
    prompt = prompt_of(117, 95)
    tokens, _ = cached(engine, prompt, 40)
    longer = prompt + tokens + prompt_of(7, 96)
    found, hits = cached(engine, longer)
    assert (hits, found) == (128, denoise(plain, torch.tensor(longer), gen_length=9).sequences[0].tolist())


@pytest.mark.parametrize(("block", "again"), [(4, 128), (6, 0)])
def test_other_blocks_have_other_keys(block, again, engine, plain):
    """Of blocks of 6, a page of 128 positions ends within one, so nothing is taken from the cache."""
    prompt = prompt_of(140, 97)
    cached(engine, prompt)
    expected = denoise(plain, torch.tensor(prompt), gen_length=9, block_length=block).sequences[0].tolist()
    assert cached(engine, prompt, block_length=block) == (expected, 0)
    assert cached(engine, prompt, block_length=block) == (expected, again)


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 16, 85])
def test_logits_of_every_step(length, engine, plain):
    """The plain model is given the engine's own canvas before each step, with the mask of the whole sequence."""
    prompt, wanted = prompt_of(length, 70 + length), 19
    with Recorder(engine) as recorder:
        tokens, _ = cached(engine, prompt, wanted)
    found, expected = [], []
    for line, canvas, columns, logits in recorder.steps:
        if logits is None:
            continue
        begin, width = int(line[Column.START]), int(line[Column.WIDTH])
        done = begin - length
        x = torch.tensor([*prompt, *tokens[:done], *canvas[:width].tolist()])[None]
        mask = context_mask(x.shape[1], 8, "block_causal")[None, None]
        found.append(logits)
        expected.append(plain(x, mask).logits[0, begin + columns])
    assert len(found) == wanted
    found, expected = torch.cat(found), torch.cat(expected)
    # Sums of float32 in another order, in three layers; 2^-24 each.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * float(expected.std()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache": "none"}, "dlm_cache none isn't what a llada2 model computes"),
        ({"cache": "prefix"}, "dlm_cache prefix isn't"),
        ({"cache": "dual"}, "dlm_cache dual isn't"),
        ({"block_length": 16}, "dlm_block_length 16 is longer than the 8 tokens"),
        ({"cfg_scale": 1.0}, "dlm_cfg_scale 1.0 isn't supported for a llada2 model"),
    ],
)
def test_what_the_model_was_not_trained_for_is_refused(engine, options, words):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=words):
        engine.generate([{"prompt_token_ids": [5, 6]}], [params(16, **options)], use_tqdm=False)


def test_a_measurement_of_speed_reads_its_prompts_each_time(folder):
    workload = Workload(torch.tensor([prompt_of(140, 3)]), gen_length=8, block_length=8, steps=8, batch_sizes=(1,))
    sampler = vllm_sampler(folder, workload, torch.float32, skip_tokenizer_init=True, num_gpu_blocks_override=8)
    for _ in range(2):
        sampler(workload.prompts, workload, "commit")
    engine = sampler._engine._engine
    (output,) = engine.generate([{"prompt_token_ids": workload.prompts[0].tolist()}], params(8), use_tqdm=False)
    assert not output.num_cached_tokens
