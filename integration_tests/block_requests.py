"""Requests to a model that denoises block by block in vLLM's engine, compared with the plain sampler one by one."""

import random

import torch

from sinkprune_plugin.sampling import denoise

__all__ = ["check", "check_preempted", "params", "prompt_of"]


def prompt_of(length, seed):
    return torch.randint(4, 88, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def params(max_tokens, stop=(), **options):
    from vllm import SamplingParams

    asked = {f"dlm_{name}": value for name, value in options.items()}
    return SamplingParams(
        max_tokens=max_tokens, stop_token_ids=list(stop), ignore_eos=True, detokenize=False, extra_args=asked
    )


def answer_of(plain, prompt, max_tokens, *, stop=None, **options):
    """Tokens of the plain sampler."""
    answer = denoise(plain, torch.tensor(prompt), gen_length=max_tokens, eos_token_ids=stop, **options)
    return answer.sequences[0].tolist()


def check(engine, plain, requests):
    """One batch in the engine against one call of the sampler for each request."""
    prompts = [{"prompt_token_ids": prompt} for prompt, _, _ in requests]
    outputs = engine.generate(prompts, [params(n, **o) for _, n, o in requests], use_tqdm=False)
    for (prompt, max_tokens, options), output in zip(requests, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        assert tokens == answer_of(plain, prompt, max_tokens, **options), (len(prompt), max_tokens, options)


def check_preempted(engine, plain, requests):
    """Requests (prompt, max_tokens) that lose their cache at random steps give the same tokens."""
    core = engine.llm_engine
    scheduler = core.engine_core.engine_core.scheduler
    rng = random.Random(1)
    for number, (prompt, wanted) in enumerate(requests):
        core.add_request(str(number), {"prompt_token_ids": prompt}, params(wanted))
    tokens, preempted = {}, 0
    while core.has_unfinished_requests():
        for output in core.step():
            tokens[int(output.request_id)] = list(output.outputs[0].token_ids)
        running = [r for r in scheduler.running if 0 < r.num_output_tokens < 24]
        if running and preempted < 4 and rng.random() < 0.3:
            victim = rng.choice(running)
            scheduler.running.remove(victim)
            scheduler._preempt_request(victim, 0.0)
            preempted += 1
    assert preempted
    for number, (prompt, wanted) in enumerate(requests):
        assert tokens[number] == answer_of(plain, prompt, wanted)
