"""Shared by the tests that drive the real tools: a fresh compression session each, and the golden numbers."""

import json

import pytest
import torch
from golden_data import GOLDEN
from safetensors.torch import load_file

from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer


@pytest.fixture(autouse=True)
def _fresh_session():
    from llmcompressor.core import reset_session

    reset_session()
    yield
    reset_session()


@pytest.fixture
def model():
    """tiny-llada in float32, fresh for each test."""
    return load_model(EMBEDDED_MODEL, torch.float32)


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(EMBEDDED_MODEL)


@pytest.fixture(scope="session")
def golden_windows():
    """(16, 256) int64, the clean calibration samples of the golden runs."""
    return load_file(GOLDEN / "calibration.safetensors")["input_ids"].long()


@pytest.fixture(scope="session")
def golden_perplexity():
    return json.loads((GOLDEN / "perplexity.json").read_text())


@pytest.fixture(scope="session")
def evaluate():
    """Function model → ELBO perplexity on the recorded evaluation corruption."""
    from sinkprune_plugin.diffusion import perplexity_on

    recorded = load_file(GOLDEN / "evaluation.safetensors")

    def run(model):
        elbo, _ = perplexity_on(
            model, recorded["clean_ids"].long(), recorded["noisy_ids"].long(), recorded["p_mask"], batch_size=16
        )
        return elbo

    return run
