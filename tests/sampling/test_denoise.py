"""The plain sampler against samplers written out in sampling_references, and its own rules."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from official_checkpoints import write_dream, write_llada
from sampling_references import plain_cached_logits, plain_denoise, plain_logits

from sinkprune_plugin.diffusion import resolve_diffusion
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.sampling import SamplingOptions, denoise
from sinkprune_plugin.text_windows import embedded_text, read_documents, token_windows

CACHED = ["prefix", "dual", "commit"]


@pytest.fixture(scope="module")
def embedded():
    return load_model(EMBEDDED_MODEL, torch.float32)


@pytest.fixture(scope="module")
def text():
    documents = read_documents(embedded_text("test"))
    return token_windows(documents, load_tokenizer(EMBEDDED_MODEL), 64, 8)


@pytest.fixture(scope="module")
def random_models(tmp_path_factory):
    """Both families with random weights, whose predictions depend on every key and value."""
    folder = tmp_path_factory.mktemp("models")
    write_llada(folder / "llada", seed=1, n_kv_heads=2, max_sequence_length=128)
    write_dream(folder / "dream", seed=2)
    return {name: load_model(folder / name, torch.float32) for name in ("llada", "dream")}


class Projected:
    """Rows that a model's vocabulary projection computes, call by call."""

    def __init__(self, model):
        self.rows = []
        self.handle = model.get_output_embeddings().register_forward_pre_hook(self.note)

    def note(self, _module, inputs):
        self.rows.append(inputs[0].shape[1])


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "commit"])
def test_only_logits_of_the_open_block_are_computed(family, cache, random_models):
    """Those of all positions would be the largest tensor of all: 2 GB for 8 × 1024 positions of LLaDA-8B."""
    model = random_models[family]
    projected = Projected(model)
    try:
        denoise(model, random_prompt(0, 10), gen_length=24, block_length=8, cache=cache)
    finally:
        projected.handle.remove()
    # A commit's pass over final tokens is about keys and values.
    passes = [8] * 24 if cache != "commit" else [10, *[8] * 8, 8, *[8] * 8, 8, *[8] * 8]
    assert projected.rows == passes


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_logits_to_keep_are_those_of_all_positions(family, random_models):
    model, ids = random_models[family], random_prompt(1, 12)[None]
    every = model(ids).logits
    # Fewer rows may be summed in another order.
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, every[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([2, 7])).logits, every[:, [2, 7]])


def random_prompt(seed, length):
    # Ids beyond the special tokens of all models here.
    return torch.randint(4, 88, (length,), generator=torch.Generator().manual_seed(seed))


def reference(model, prompt, *, gen_length, block_length=None, steps=None, cache="none", cfg_scale=0.0, **options):
    spec = resolve_diffusion(model.config)
    plan = SamplingOptions.resolve(gen_length=gen_length, block_length=block_length, steps=steps)
    if cache == "none":
        logits = plain_logits(model, cfg_scale, spec.mask_token_id, spec.logit_shift)
    else:
        logits = plain_cached_logits(model, cache, len(prompt), spec.logit_shift)
    per_block = [plan.steps_in_block(block) for block in range(len(plan.blocks))]
    return plain_denoise(logits, prompt, spec.mask_token_id, blocks=plan.blocks, steps=per_block, **options)


def one(model, prompt, **options):
    return denoise(model, prompt, **options).sequences[0]


PUBLISHED = {
    "one block": {"gen_length": 24, "block_length": 24},
    "semi-autoregressive": {"gen_length": 32, "block_length": 8},
    "fewer steps than tokens": {"gen_length": 32, "block_length": 16, "steps": 8},
    "steps that don't divide": {"gen_length": 32, "block_length": 16, "steps": 14},
    "one step per block": {"gen_length": 24, "block_length": 8, "steps": 3},
    "last block short": {"gen_length": 21, "block_length": 8, "steps": 11},
    "guided": {"gen_length": 24, "block_length": 8, "steps": 12, "cfg_scale": 1.5},
    "random": {"gen_length": 24, "block_length": 8, "steps": 12, "remasking": "random", "seed": 5},
    "margin": {"gen_length": 24, "block_length": 8, "steps": 12, "remasking": "margin"},
    "entropy": {"gen_length": 24, "block_length": 8, "steps": 12, "remasking": "entropy"},
    "sampled": {"gen_length": 24, "block_length": 8, "temperature": 0.8, "seed": 11},
    "sampled, guided, few steps": {
        "gen_length": 24,
        "block_length": 12,
        "steps": 8,
        "temperature": 1.0,
        "cfg_scale": 0.5,
        "seed": 2**62,
    },
    "threshold": {"gen_length": 32, "block_length": 16, "threshold": 0.4},
    "factor": {"gen_length": 32, "block_length": 16, "factor": 1.2},
    "factor, sampled": {"gen_length": 32, "block_length": 16, "factor": 0.8, "temperature": 0.5, "seed": 2},
    # The second block's noise must be counted from its own beginning, however many steps the first one took.
    "threshold, sampled": {"gen_length": 32, "block_length": 16, "threshold": 0.4, "temperature": 0.5, "seed": 2},
}


@pytest.mark.parametrize("options", PUBLISHED.values(), ids=PUBLISHED)
def test_without_cache_it_is_the_published_sampler(embedded, text, options):
    for prompt in (text[0, :20], text[1, :7]):
        assert one(embedded, prompt, **options).tolist() == reference(embedded, prompt, **options).tolist()


def test_the_options_compared_make_a_difference(embedded, text):
    """So that the test above could tell them apart."""
    variations = [{"steps": 6}, {"cfg_scale": 1.5}, {"remasking": "random"}, {"remasking": "margin"}]
    variations += [
        {"remasking": "entropy"},
        {"temperature": 0.8},
        {"temperature": 0.8, "seed": 1},
        {"block_length": 24},
    ]
    options = {"gen_length": 24, "block_length": 8}
    results = [one(embedded, text[0, :20], **(options | changes)).tolist() for changes in [{}, *variations]]
    assert len(set(map(tuple, results))) == len(results)


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("cache", CACHED)
@given(data=st.data())
@settings(deadline=None, max_examples=12)
def test_a_cache_equals_full_passes_with_recorded_keys_and_values(random_models, family, cache, data):
    gen_length = data.draw(st.integers(2, 24), "gen_length")
    block_length = data.draw(st.integers(1, gen_length), "block_length")
    blocks = math.ceil(gen_length / block_length)
    steps = data.draw(st.integers(blocks, gen_length), "steps")
    options = {
        "gen_length": gen_length,
        "block_length": block_length,
        "steps": steps if gen_length % block_length else steps - steps % blocks,
        "cache": cache,
        "temperature": data.draw(st.sampled_from([0.0, 0.5]), "temperature"),
        "threshold": data.draw(st.sampled_from([None, None, 0.1]), "threshold"),
        "remasking": data.draw(st.sampled_from(["low_confidence", "margin"]), "remasking"),
        "seed": data.draw(st.integers(0, 100), "seed"),
    }
    prompt = random_prompt(data.draw(st.integers(0, 100), "prompt"), data.draw(st.integers(1, 20), "length"))
    model = random_models[family]
    assert one(model, prompt, **options).tolist() == reference(model, prompt, **options).tolist()


@pytest.mark.parametrize("cache", CACHED)
def test_caches_equal_the_reference_on_the_embedded_model(embedded, text, cache):
    options = {"gen_length": 48, "block_length": 16, "steps": 24, "cache": cache}
    for prompt in (text[2, :30], text[3, :3]):
        assert one(embedded, prompt, **options).tolist() == reference(embedded, prompt, **options).tolist()


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_caches_are_approximations_of_different_kinds(random_models, family):
    """The equalities above don't hold merely because every cache is the exact computation."""
    results = {
        cache: one(random_models[family], random_prompt(0, 10), gen_length=24, block_length=8, cache=cache).tolist()
        for cache in ["none", *CACHED]
    }
    assert len({tuple(tokens) for tokens in results.values()}) == 4


@pytest.mark.parametrize("steps", [24, 12])
def test_shifted_logits_equal_the_reference(random_models, steps):
    for length in (1, 9):
        options = {"gen_length": 24, "block_length": 8, "steps": steps, "temperature": 0.3}
        prompt = random_prompt(length, length)
        result = one(random_models["dream"], prompt, **options)
        assert result.tolist() == reference(random_models["dream"], prompt, **options).tolist()


def lengths_of_passes(model, cache):
    """Length of the input of each forward pass: prompt of 10, two blocks of 4 with two steps each."""
    lengths = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        output = denoise(model, random_prompt(0, 10), gen_length=8, block_length=4, steps=4, cache=cache)
    finally:
        hook.remove()
    assert output.forwards == len(lengths)
    return lengths


def test_caches_save_what_they_should(random_models):
    assert lengths_of_passes(random_models["llada"], "none") == [18, 18, 18, 18]
    assert lengths_of_passes(random_models["llada"], "prefix") == [18, 8, 18, 4]
    assert lengths_of_passes(random_models["llada"], "dual") == [18, 4, 18, 4]
    # The prompt first, the first block once more when it is finished, the last block not.
    assert lengths_of_passes(random_models["llada"], "commit") == [10, 4, 4, 4, 4, 4]


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("cache", ["none", *CACHED])
@pytest.mark.parametrize("threshold", [None, 0.12])
def test_prompts_together_equal_prompts_one_at_a_time(random_models, family, cache, threshold):
    model = random_models[family]
    prompts = [random_prompt(number, length) for number, length in enumerate([5, 1, 5, 17, 5, 17])]
    seeds = [3, 1, 4, 1, 5, 9]
    options = {
        "gen_length": 20,
        "block_length": 8,
        "cache": cache,
        "temperature": 0.6,
        "threshold": threshold,
        # Many, so that rows of one batch stop after different blocks.
        "eos_token_ids": list(range(30, 34)),
    }
    together = denoise(model, prompts, seed=seeds, **options).sequences
    apart = [one(model, prompt, seed=seed, **options) for prompt, seed in zip(prompts, seeds, strict=True)]
    assert [row.tolist() for row in together] == [row.tolist() for row in apart]
    assert len({len(row) for row in together}) > 1


def test_forms_of_input_are_alike(embedded, text):
    rows = denoise(embedded, text[:2, :9], gen_length=8).sequences
    as_list = denoise(embedded, [text[0, :9], text[1, :9]], gen_length=8).sequences
    assert [row.tolist() for row in rows] == [row.tolist() for row in as_list]
    assert one(embedded, text[0, :9], gen_length=8).tolist() == rows[0].tolist()
    # Can be changed by its owner.
    rows[0][0] = 7


def test_generation_stops_after_the_block_with_an_end_token(embedded, text):
    options = {"gen_length": 32, "block_length": 8}
    whole = denoise(embedded, text[0, :20], **options)
    tokens = whole.sequences[0].tolist()
    assert whole.forwards == 32
    # A token that comes first in the second block, and not at its end.
    end = next(i for i in range(8, 15) if tokens[i] not in tokens[:i])
    stopped = denoise(embedded, text[0, :20], eos_token_ids={tokens[end], 2047}, **options)
    assert stopped.sequences[0].tolist() == tokens[: end + 1]
    assert stopped.forwards == 16
    assert len(denoise(embedded, text[0, :20], eos_token_ids=[2047], **options).sequences[0]) == 32


def test_seeds_change_what_is_sampled_and_nothing_else(embedded, text):
    options = {"gen_length": 16, "temperature": 1.0}
    results = denoise(embedded, text[:1, :9].expand(3, -1), seed=[0, 1, 0], **options).sequences
    assert results[0].tolist() == results[2].tolist() != results[1].tolist()
    greedy = denoise(embedded, text[:1, :9].expand(2, -1), seed=[0, 1], gen_length=16).sequences
    assert greedy[0].tolist() == greedy[1].tolist()


def test_the_trajectory_shows_each_step(embedded, text):
    options = {"gen_length": 16, "block_length": 8, "steps": 6}
    output = denoise(embedded, [text[0, :9], text[1, :4]], return_trajectory=True, **options)
    plan = SamplingOptions.resolve(**options)
    for tokens, canvases in zip(output.sequences, output.trajectory, strict=True):
        assert canvases.shape == (6, 16)
        assert canvases[-1].tolist() == tokens.tolist()
        masks = (canvases == embedded.config.mask_token_id).sum(1).tolist()
        unmasked = [before - after for before, after in zip([16, *masks], masks, strict=False)]
        assert unmasked == [*plan.tokens_per_step(0), *plan.tokens_per_step(1)]
        # What is unmasked stays.
        for before, after in itertools.pairwise(canvases):
            kept = before != embedded.config.mask_token_id
            assert torch.equal(before[kept], after[kept])
    assert denoise(embedded, text[0, :9], **options).trajectory == []


def test_the_model_is_evaluated_and_left_as_it_was(tmp_path):
    write_llada(tmp_path, residual_dropout=0.5, attention_dropout=0.5, embedding_dropout=0.5)
    model = load_model(tmp_path, torch.float32)
    expected = one(model, random_prompt(0, 5), gen_length=16)
    model.train()
    assert one(model, random_prompt(0, 5), gen_length=16).tolist() == expected.tolist()
    assert model.training
    assert not expected.requires_grad


def test_bfloat16_models_run(text):
    model = load_model(EMBEDDED_MODEL)
    assert model.dtype == torch.bfloat16
    for cache in ["none", *CACHED]:
        assert len(one(model, text[0, :9], gen_length=16, block_length=8, cache=cache)) == 16


@pytest.mark.parametrize("cache", ["none", *CACHED])
@pytest.mark.parametrize("changes", [{}, {"threshold": 0.3}, {"factor": 1.0}])
def test_stopping_early_saves_steps_and_nothing_else(embedded, random_models, text, cache, changes):
    options = {"gen_length": 24, "block_length": 12, "cache": cache, **changes}
    saved = 0
    for model, prompts in (
        (embedded, [text[0, :20], text[1, :20], text[2, 30:50]]),
        (random_models["dream"], [random_prompt(number, 9) for number in range(3)]),
    ):
        batch = torch.stack(prompts)
        # A token that comes inside of the first prompt's first block; its row leaves the batch in the middle of it.
        end = int(one(model, prompts[0], **options)[5])
        full = denoise(model, batch, eos_token_ids=[end], **options)
        early = denoise(model, batch, eos_token_ids=[end], early_stop=True, **options)
        assert [tokens.tolist() for tokens in early.sequences] == [tokens.tolist() for tokens in full.sequences]
        assert len(early.sequences[0]) <= 6
        forwards = [
            denoise(model, prompts[0], eos_token_ids=[end], early_stop=stop, **options).forwards
            for stop in (False, True)
        ]
        assert forwards[1] <= forwards[0]
        saved += forwards[0] - forwards[1]
    assert saved > 0
