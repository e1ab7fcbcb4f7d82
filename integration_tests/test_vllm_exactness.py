"""Tokens from vLLM's engine, many requests at once, equal those of the plain sampler one by one.

Both compute in float32, in other orders; a tie of two confidences could be resolved differently but this hasn't been
seen, so equality is asserted without tolerance.
"""

import random

import pytest
import torch
from unequal_blocks import make_unequal
from vllm_engine import make_engine, prepare_vllm

from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.models.block_sizes import block_sizes
from sinkprune_plugin.sampling import denoise
from sinkprune_plugin.text_windows import embedded_text, read_documents

CACHES = ("none", "prefix", "dual", "commit")
# A comma, which the embedded model writes often: as an end of sequence it comes inside of blocks.
COMMA = 14
THE = 262


@pytest.fixture(scope="session")
def engine():
    return make_engine(EMBEDDED_MODEL)


@pytest.fixture(scope="session")
def plain():
    return load_model(EMBEDDED_MODEL, torch.float32)


@pytest.fixture(scope="session")
def text_ids():
    text = " ".join(read_documents(embedded_text("test")))[:40_000]
    return load_tokenizer(EMBEDDED_MODEL)(text)["input_ids"]


def params(max_tokens, top_k=0, top_p=1.0, stop=(), **options):
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=max_tokens,
        top_k=top_k,
        top_p=top_p,
        stop_token_ids=list(stop),
        extra_args={f"dlm_{name}": value for name, value in options.items()},
    )


def generate(engine, prompts, settings):
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
    return [[list(sample.token_ids) for sample in output.outputs] for output in outputs]


def oracle(plain, prompt, max_tokens, **options):
    eos = options.pop("stop", None)
    options.setdefault("gen_length", max_tokens)
    (tokens,) = denoise(plain, torch.tensor(prompt), eos_token_ids=eos, **options).sequences
    return tokens[:max_tokens].tolist()


def check(engine, plain, requests):
    """One batch in the engine against one call of the sampler for each request."""
    found = generate(engine, [prompt for prompt, _, _ in requests], [params(n, **o) for _, n, o in requests])
    for (prompt, max_tokens, options), (tokens,) in zip(requests, found, strict=True):
        assert tokens == oracle(plain, prompt, max_tokens, **options), (len(prompt), max_tokens, options)


def prompt_of(text_ids, length, rng):
    start = rng.randrange(len(text_ids) - length)
    return text_ids[start : start + length]


@pytest.mark.parametrize("cache", CACHES)
def test_greedy_tokens_equal_those_of_the_plain_sampler(cache, engine, plain, text_ids):
    rng = random.Random(0)
    shapes = [
        # prompt, max_tokens, options
        (1, 8, {"block_length": 8}),
        (100, 128, {"block_length": 32, "steps": 32}),
        (17, 64, {"block_length": 16, "steps": 16}),
        (33, 32, {"block_length": 32}),
        (5, 48, {"block_length": 16, "steps": 24}),
        (64, 16, {"block_length": 8}),
        # Fewer steps than tokens, and not dividing the width: 16 tokens in 5 steps.
        (2, 16, {"block_length": 16, "steps": 5}),
        # The last block is short.
        (40, 20, {"block_length": 8}),
        (9, 50, {"block_length": 32, "steps": 20}),
        # Fewer tokens requested than generated: the answer is cut, inside a block too.
        (12, 10, {"block_length": 8, "gen_length": 64}),
        (80, 16, {"block_length": 16, "gen_length": 32, "steps": 8}),
        # An end of sequence inside a block.
        (30, 64, {"block_length": 32, "steps": 32, "stop": (COMMA,)}),
        (21, 32, {"block_length": 8, "stop": (COMMA,)}),
        (3, 24, {"block_length": 8, "steps": 12, "stop": (COMMA,)}),
        # Defaults.
        (7, 16, {}),
        (50, 40, {}),
    ]
    requests = [
        (prompt_of(text_ids, length, rng), wanted, {"cache": cache, **options}) for length, wanted, options in shapes
    ]
    check(engine, plain, requests)


def test_everything_mixed_in_one_batch(engine, plain, text_ids):
    """Every remasking, thresholds, noise and filters, and all caches, in one batch."""
    rng = random.Random(1)
    requests = []
    for number in range(24):
        wanted = rng.choice([8, 20, 32])
        block = rng.choice([8, min(16, wanted)])
        options = {"cache": CACHES[number % 4], "block_length": block, "seed": rng.randrange(10_000)}
        options["remasking"] = ("low_confidence", "random", "margin", "entropy")[number // 4 % 4]
        if number % 3 == 0:
            options |= {"temperature": rng.choice([0.3, 0.7, 1.0]), "top_k": rng.choice([0, 5]), "top_p": 0.9}
        if number % 5 == 0 and options["remasking"] != "entropy":
            options["threshold"] = rng.choice([0.1, 0.4, 0.8])
        requests.append((prompt_of(text_ids, rng.randrange(1, 60), rng), wanted, options))
    check(engine, plain, requests)


def test_factor_and_early_stop(engine, plain, text_ids):
    """Steps whose number depends on what the model says, in every cache, each alone and all together."""
    rng = random.Random(3)
    requests = []
    for number in range(12):
        rule = (
            {"factor": 1.3},
            {"early_stop": True, "stop": (COMMA,)},
            {"factor": 0.8, "early_stop": True, "stop": (COMMA,)},
        )
        options = {"cache": CACHES[number % 4], "block_length": 16, **rule[number // 4]}
        requests.append((prompt_of(text_ids, rng.randrange(1, 60), rng), 48, options))
    check(engine, plain, requests)
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    steps = []
    for early in (False, True):
        before = scheduler.current_step
        check(engine, plain, [(text_ids[:20], 24, {"block_length": 24, "stop": (THE,), "early_stop": early})])
        steps.append(scheduler.current_step - before)
    # Its second word comes in the fourth step.
    assert steps[0] - steps[1] == 20


def test_noise_changes_with_the_seed_and_not_with_the_batch(engine, text_ids):
    prompt = text_ids[:20]
    one = params(24, temperature=1.0, seed=3)
    (alone,) = generate(engine, [prompt], [one])[0]
    others = [params(24, temperature=1.0, seed=seed) for seed in range(6)]
    together = [tokens for (tokens,) in generate(engine, [prompt] * 6, others)]
    assert together[3] == alone
    assert len({tuple(tokens) for tokens in together}) == 6


def test_standard_temperature_and_seed_mean_the_same(engine, text_ids):
    from vllm import SamplingParams

    prompt = text_ids[:20]
    standard = SamplingParams(max_tokens=16, temperature=0.8, seed=5)
    assert generate(engine, [prompt], [standard]) == generate(engine, [prompt], [params(16, temperature=0.8, seed=5)])
    cold = SamplingParams(max_tokens=16, temperature=0.0)
    assert generate(engine, [prompt], [cold]) == generate(engine, [prompt], [params(16)])


def test_n_samples_have_seeds_that_count_up(engine, plain, text_ids):
    prompt = text_ids[100:130]
    settings = params(16, temperature=1.0, seed=7, block_length=8)
    settings.n = 2
    (samples,) = generate(engine, [prompt], [settings])
    assert samples == [oracle(plain, prompt, 16, temperature=1.0, seed=seed, block_length=8) for seed in (7, 8)]
    assert samples[0] != samples[1]


def scheduler_of(engine):
    return engine.llm_engine.engine_core.engine_core.scheduler


def steps_of(engine, requests):
    """Add requests; generator of the engine's steps, which returns their tokens in order."""
    core, tokens = engine.llm_engine, {}
    for number, (prompt, max_tokens, options) in enumerate(requests):
        core.add_request(str(number), {"prompt_token_ids": prompt}, params(max_tokens, **options))
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                tokens[int(output.request_id)] = list(output.outputs[0].token_ids)
        yield
    return [tokens[number] for number in range(len(requests))]


def check_while_preempting(engine, plain, requests, at):
    """As :func:`check`, and all requests are preempted after some steps, as vLLM does for new weights."""
    running, steps = set(), steps_of(engine, requests)
    try:
        for step in range(10_000):
            next(steps)
            if step in at:
                running |= {options_of(request).cache for request in scheduler_of(engine).running}
                engine.reset_prefix_cache(reset_running_requests=True)
    except StopIteration as stop:
        found = stop.value
    assert running == set(CACHES)
    for (prompt, max_tokens, options), tokens in zip(requests, found, strict=True):
        assert tokens == oracle(plain, prompt, max_tokens, **options), (len(prompt), max_tokens, options)


def options_of(request):
    from sinkprune_plugin.vllm.request_plan import plan_of

    return plan_of(request.sampling_params, 128)


def test_preemption_changes_nothing(engine, plain, text_ids):
    """In the first block, in its last step, in later blocks and while `commit` computes again what it had kept."""
    rng = random.Random(2)
    requests = [
        (prompt_of(text_ids, 40, rng), 40, {"cache": cache, "block_length": 8, "steps": 20, "temperature": heat})
        for cache in CACHES
        for heat in (0.0, 0.7)
    ]
    check_while_preempting(engine, plain, requests, at={2, 4, 10, 13, 15, 21})


@pytest.fixture(scope="module")
def small_engine():
    """Asynchronous scheduling, which vLLM switches off on a CPU, and eight pages of 32 tokens."""
    prepare_vllm()
    from vllm.platforms import current_platform

    class Asynchronous(type(current_platform)):
        @classmethod
        def check_and_update_config(cls, vllm_config):
            asked = vllm_config.scheduler_config.async_scheduling
            super().check_and_update_config(vllm_config)
            vllm_config.scheduler_config.async_scheduling = asked

    before = type(current_platform)
    current_platform.__class__ = Asynchronous
    try:
        made = make_engine(
            EMBEDDED_MODEL, num_gpu_blocks_override=9, block_size=32, diffusion_config={"canvas_length": 40}
        )
    finally:
        current_platform.__class__ = before
    assert made.llm_engine.engine_core.engine_core.batch_queue_size == 2
    return made


def test_the_warm_up_of_a_gpu_runs(small_engine):
    """Schedules made by hand, with requests that don't exist, up to four canvases long. Without a GPU vLLM skips it."""
    from vllm.v1.worker.gpu.warmup import warmup_kernels

    executor = small_engine.llm_engine.model_executor
    worker = executor.driver_worker.worker
    warmup_kernels(worker.model_runner, worker.execute_model, worker.sample_tokens)


def test_asynchronous_scheduling_gives_the_same_tokens(small_engine, plain, text_ids):
    """Fixed numbers of steps, thresholds that wait for their results, ends inside of blocks, and cut answers."""
    rng = random.Random(3)
    requests = []
    for number in range(12):
        options = {"cache": CACHES[number % 4], "block_length": 8, "steps": (6, 9)[number % 2]}
        if number >= 8:
            options["threshold"] = 0.4
        elif number >= 4:
            options["stop"] = (COMMA,)
        requests.append((prompt_of(text_ids, rng.randrange(1, 40), rng), 24, options))
    requests.append((prompt_of(text_ids, 9, rng), 10, {"block_length": 8, "gen_length": 40, "steps": 10}))
    preempted = count_preemptions(small_engine)
    check(small_engine, plain, requests)
    # Pages for four of 64 tokens: the others waited.
    assert preempted == []


def count_preemptions(engine):
    """List to which the cache of each request that is preempted is added."""
    scheduler, preempted = scheduler_of(engine), []
    original = type(scheduler)._preempt_request

    def counting(request, *args, **kwargs):
        preempted.append(options_of(request).cache)
        return original(scheduler, request, *args, **kwargs)

    scheduler._preempt_request = counting
    return preempted


@pytest.mark.parametrize("victim", CACHES)
def test_preemption_for_want_of_pages_changes_nothing(victim, small_engine, plain, text_ids, monkeypatch):
    """Admitted without a reservation, two `commit` requests grow until there are no pages for the last one.

    Asynchronously, a step of the victim's is on its way, whose tokens still count.
    """
    scheduler = scheduler_of(small_engine)
    monkeypatch.setattr(scheduler.kv_cache_manager, "allocate_slots", scheduler._allocate)
    rng = random.Random(4)
    requests = [
        (prompt_of(text_ids, 40, rng), 40, {"cache": cache, "block_length": 16, "steps": 10})
        for cache in ("commit", "commit", victim)
    ]
    preempted = count_preemptions(small_engine)
    check(small_engine, plain, requests)
    assert victim in preempted


def test_broken_logits_end_that_request_with_an_error(engine, plain, text_ids):
    """A token whose embedding is NaN, in the prompt of two requests: their logits break, those of the others don't."""
    token = 1999
    assert token not in text_ids
    engine.apply_model(lambda model: model.embedding.weight.data[token].fill_(torch.nan))
    try:
        prompts = [text_ids[:20], [*text_ids[:10], token], text_ids[30:40], [token]]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        settings = [params(16, block_length=8, steps=4, cache=cache) for cache in CACHES]
        outputs = [output.outputs[0] for output in engine.generate(requests, settings, use_tqdm=False)]
    finally:
        weight = plain.get_input_embeddings().weight[token]
        engine.apply_model(lambda model: model.embedding.weight.data[token].copy_(weight))
    assert [output.finish_reason for output in outputs] == ["length", "error", "length", "error"]
    assert [len(output.token_ids) for output in outputs] == [16, 0, 16, 0]
    for number in (0, 2):
        expected = oracle(plain, prompts[number], 16, block_length=8, steps=4, cache=CACHES[number])
        assert list(outputs[number].token_ids) == expected
    # The pages of those that ended hold NaN; whoever gets them next must not see it.
    check(engine, plain, [(text_ids[:70], 16, {"block_length": 8, "steps": 4, "cache": cache}) for cache in CACHES])


def test_blocks_of_different_sizes(tmp_path, text_ids):
    """Each layer has its own number of key and value heads, so the cache's pages differ too."""
    smaller = make_unequal(load_model(EMBEDDED_MODEL, torch.float32))
    assert len(set(block_sizes(smaller))) == 4
    smaller.save_pretrained(tmp_path)
    load_tokenizer(EMBEDDED_MODEL).save_pretrained(tmp_path)
    rng = random.Random(3)
    requests = [
        (prompt_of(text_ids, length, rng), wanted, {"cache": cache, "block_length": 16})
        for cache in ("none", "dual")
        for length, wanted in ((1, 16), (100, 64), (33, 40))
    ]
    check(make_engine(tmp_path), smaller, requests)
