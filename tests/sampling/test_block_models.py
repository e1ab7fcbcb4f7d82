"""The plain sampler on a model that denoises block by block: tokens equal a loop that keeps nothing between steps."""

from dataclasses import replace

import pytest
import torch
from block_references import plain_block_logits
from nemotron_labs_checkpoints import write_nemotron_labs
from official_checkpoints import write_llada2
from plain_llada2 import block_visible, plain_llada2
from plain_sdar import plain_sdar
from sampling_references import plain_denoise
from sdar_checkpoints import write_sdar

from sinkprune_plugin.diffusion import resolve_diffusion
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.loading import load_model
from sinkprune_plugin.sampling import denoise, parse_options
from sinkprune_plugin.sampling.options import SamplingOptions

CASES = {
    "defaults": (5, 8, {}),
    "one token of a prompt": (1, 8, {}),
    "a prompt that isn't whole blocks": (7, 12, {"steps": 6}),
    "a prompt of whole blocks, sampled": (8, 8, {"temperature": 0.8, "seed": 3}),
    "smaller blocks": (3, 8, {"block_length": 2, "steps": 4}),
    "a short last block": (6, 10, {}),
    "threshold": (4, 8, {"threshold": 0.05}),
    "margin": (4, 8, {"remasking": "margin"}),
}


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocks")
    config, tensors = write_nemotron_labs(folder, num_hidden_layers=2)
    return load_model(folder, torch.float32), config, tensors


def prompt_of(length):
    return torch.randint(4, 88, (length,), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("name", CASES)
def test_tokens_equal_a_plain_loop(blocks, name):
    model, config, tensors = blocks
    length, gen_length, options = CASES[name]
    resolved = SamplingOptions.resolve(gen_length=gen_length, **{"block_length": 4, **options})
    steps = [resolved.steps_in_block(number) for number in range(len(resolved.blocks))]
    rules = {key: value for key, value in options.items() if key not in ("block_length", "steps")}
    prompt = prompt_of(length)
    expected = plain_denoise(
        plain_block_logits(tensors, config), prompt, 3, blocks=resolved.blocks, steps=steps, **rules
    )
    found = denoise(model, prompt, gen_length=gen_length, **options)
    assert found.sequences[0].tolist() == expected.tolist()


def test_a_forward_pass_runs_the_open_block_only(blocks):
    """One pass for the prompt, one for each step, and one for each finished block but the last."""
    model, _, _ = blocks
    widths = []
    handle = model.register_forward_pre_hook(
        lambda _module, _args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        output = denoise(model, prompt_of(9), gen_length=12, steps=6)
    finally:
        handle.remove()
    assert output.forwards == 1 + 6 + 2
    assert widths == [9, *[4] * 8]


def test_prompts_together_and_alone(blocks):
    model, _, _ = blocks
    prompts = [prompt_of(length) for length in (3, 5, 5)]
    together = denoise(model, prompts, gen_length=8).sequences
    assert all(
        torch.equal(one, denoise(model, p, gen_length=8).sequences[0]) for one, p in zip(together, prompts, strict=True)
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache": "none"}, "dlm_cache none isn't what a nemotron_labs model computes.*use that, or leave it out"),
        ({"cache": "dual"}, "dlm_cache dual isn't"),
        ({"cfg_scale": 1.0}, "dlm_cfg_scale 1.0 isn't supported"),
        ({"block_length": 8}, "dlm_block_length 8 is longer than the 4 tokens of a block.*at most 4"),
    ],
)
def test_what_the_model_was_not_trained_for_is_refused(blocks, options, words):
    model, _, _ = blocks
    spec = resolve_diffusion(model.config)
    asked = {f"dlm_{name}": value for name, value in options.items()}
    calls = (
        lambda: denoise(model, prompt_of(4), gen_length=8, **options),
        lambda: parse_options(asked, max_tokens=8, spec=spec),
    )
    for call in calls:
        with pytest.raises(UsageError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


def test_defaults_are_the_model_s_own(blocks):
    spec = resolve_diffusion(blocks[0].config)
    options = parse_options({}, max_tokens=12, spec=spec)
    assert (options.cache, options.block_length) == ("commit", 4)
    assert parse_options({}, max_tokens=3, spec=spec).block_length == 3
    assert parse_options({}, max_tokens=12).cache == "none"


@pytest.mark.parametrize(
    ("length", "gen_length", "options"), [(8, 8, {}), (7, 12, {}), (2, 9, {"steps": 5}), (1, 3, {}), (6, 3, {})]
)
@pytest.mark.parametrize(
    ("write", "plain", "mask"), [(write_llada2, plain_llada2, 2), (write_sdar, plain_sdar, 3)], ids=["llada2", "sdar"]
)
def test_blocks_on_a_grid_over_prompt_and_generation(write, plain, mask, length, gen_length, options, tmp_path):
    """The first block has the rest of the prompt, and context tokens see their own block and those before."""
    config, tensors = write(tmp_path)
    model = load_model(tmp_path, torch.float32)
    resolved = SamplingOptions.resolve(gen_length=gen_length, block_length=min(4, gen_length), **options)
    own = replace(resolved, block_length=4, on_grid=True, offset=length % 4)
    assert resolved.after_prompt(length, resolve_diffusion(model.config)) == own

    def logits(x, begin, end, step):
        result = plain(tensors, config, x[0, :end], block_visible(end, 4))
        return torch.nn.functional.pad(result, (0, 0, 0, x.shape[1] - end))[None]

    steps = [own.steps_in_block(number) for number in range(len(own.blocks))]
    expected = plain_denoise(logits, prompt_of(length), mask, blocks=own.blocks, steps=steps)
    found = denoise(model, prompt_of(length), gen_length=gen_length, **options)
    assert found.sequences[0].tolist() == expected.tolist()
