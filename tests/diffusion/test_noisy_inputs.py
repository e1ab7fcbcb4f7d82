"""Inputs of models that denoise block by block: a pass is every block open in turn, the ELBO the blocks' sum."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nemotron_labs_checkpoints import write_nemotron_labs
from plain_nemotron_labs import plain_nemotron_labs

from sinkprune_plugin.diffusion import (
    check_block_window,
    clean_inputs,
    corrupt,
    measure_likelihood,
    noisy_inputs,
    predict_noisy,
    resolve_diffusion,
    sample_generator,
    score_windows,
)
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.loading import load_model

CPU = torch.device("cpu")
# Both sides compute in float32 with other orders of operations; logits are of size 1.
CLOSE = {"atol": 1e-4, "rtol": 1e-5}


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """A random model with blocks of 4: model, its config.json and tensors, its spec."""
    folder = tmp_path_factory.mktemp("blocks")
    config, tensors = write_nemotron_labs(folder)
    model = load_model(folder, torch.float32)
    return model, config, tensors, resolve_diffusion(model.config)


def windows_of(rows, length, seed=0):
    # Without the mask token, 3.
    return torch.randint(4, 88, (rows, length), generator=torch.Generator().manual_seed(seed))


def one_block(config, tensors, clean, noisy, begin, end):
    """Logits of the block [begin, end), noisy, after the clean tokens before it, written out with the plain forward."""
    ids = torch.cat([clean[:begin], noisy[begin:end]])
    visible = [list(range(q + 1)) if q < begin else list(range(end)) for q in range(end)]
    return plain_nemotron_labs(tensors, config, ids, visible)[begin:]


@given(begin=st.integers(0, 7), length=st.integers(1, 12), padding=st.integers(0, 3), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=15)
@torch.no_grad()
def test_one_pass_has_every_block_after_its_clean_context(blocks, begin, length, padding, seed):
    model, config, tensors, spec = blocks
    end = begin + length
    clean, noisy = windows_of(1, end + padding, seed), windows_of(1, end + padding, seed + 1)
    valid = torch.arange(end + padding)[None] < end
    inputs = noisy_inputs(noisy, clean, spec, valid if padding else None, begin=begin)
    logits = predict_noisy(model, inputs, CPU)[0]
    assert len(logits) == length + padding
    for first in range(begin, end, 4):
        last = min(first + 4, end)
        expected = one_block(config, tensors, clean[0], noisy[0], first, last)
        torch.testing.assert_close(logits[first - begin : last - begin], expected, **CLOSE)


@torch.no_grad()
def test_a_clean_pass_is_how_a_prompt_is_read(blocks):
    model, config, tensors, spec = blocks
    clean = windows_of(1, 11)
    logits = model(**clean_inputs(clean, spec).arguments).logits[0]
    causal = [list(range(q + 1)) for q in range(11)]
    torch.testing.assert_close(logits, plain_nemotron_labs(tensors, config, clean[0], causal), **CLOSE)


def test_other_models_see_the_noisy_window_alone():
    spec = resolve_diffusion({"model_type": "llada", "vocab_size": 90, "mask_token_id": 2})
    noisy, clean = windows_of(2, 8), windows_of(2, 8, 1)
    valid = torch.arange(8)[None] < torch.tensor([[8], [5]])
    inputs = noisy_inputs(noisy, clean, spec, valid)
    assert inputs.context == 0
    assert torch.equal(inputs.arguments["input_ids"], noisy)
    assert torch.equal(inputs.arguments["attention_mask"], valid.long())
    assert set(noisy_inputs(noisy, clean, spec).arguments) == {"input_ids"}


@torch.no_grad()
def test_the_likelihood_is_the_sum_over_blocks_each_given_the_clean_ones_before_it(blocks):
    model, config, tensors, spec = blocks
    windows = windows_of(3, 12)
    scores = score_windows(model, windows, spec, num_samples=2, seed=5, batch_size=4)
    for row, window in enumerate(windows):
        offset = torch.rand((), generator=sample_generator(5, 2, window), dtype=torch.float64).item()
        for sample in range(2):
            t = 1 - (sample + offset) / 2
            noise = corrupt(window[None], t, spec, noise_eps=1e-3, generators=[sample_generator(5, sample, window)])
            total = 0.0
            for begin in (0, 4, 8):
                logits = one_block(config, tensors, window, noise.noisy_ids[0], begin, begin + 4)
                chosen = noise.corrupted[0, begin : begin + 4]
                log_p = logits.log_softmax(-1)[chosen].gather(1, window[begin : begin + 4][chosen][:, None])
                total -= log_p.double().sum().item()
            assert scores.nll[row, sample].item() == pytest.approx(total, abs=1e-3)
            assert scores.p_mask[row, sample].item() == pytest.approx(0.999 * t + 1e-3)


@torch.no_grad()
def test_the_elbo_of_a_model_that_knows_nothing_is_that_of_guessing(blocks):
    """All logits equal: each token costs ln V, whatever the noise, and the control variate makes the estimate exact."""
    model, _, _, spec = blocks
    weight = model.diffusion_head.weight.clone()
    model.diffusion_head.weight.zero_()
    try:
        found = measure_likelihood(model, windows_of(4, 12), spec, num_samples=4).elbo
    finally:
        model.diffusion_head.weight.copy_(weight)
    assert found.nll_per_token == pytest.approx(math.log(88), rel=1e-5)


@pytest.mark.parametrize(
    ("length", "words"),
    [(7, "7 tokens has less than two blocks of 4.*at least 8"), (10, "10 tokens isn't divisible by 4.*use 8 or 12")],
)
def test_windows_that_do_not_fit_the_blocks_are_refused(blocks, length, words):
    model, _, _, spec = blocks
    for call in (lambda: check_block_window(length, spec), lambda: score_windows(model, windows_of(2, length), spec)):
        with pytest.raises(UsageError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


def test_a_wrong_block_length_is_named():
    config = {"model_type": "nemotron_labs_diffusion", "vocab_size": 200}
    assert resolve_diffusion(config).block_length == 32
    assert resolve_diffusion(config | {"block_size": 8}).block_length == 8
    for wrong in (0, "8", 4.0, True):
        with pytest.raises(UsageError, match=r"config\.block_size is .*at least 1"):
            resolve_diffusion(config | {"block_size": wrong})
