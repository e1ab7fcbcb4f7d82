"""A step of the batch sampler: Triton kernels (in the interpreter, or on a GPU) and the CPU's code against the plain
functions that `denoise` calls, for all options and odd shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampler_cases import BACKENDS, GPU, Case, triton_backend

from sinkprune_plugin.sampling import batched as batched_module
from sinkprune_plugin.sampling import row_statistics

# Torch's code is the CPU's.
NAMES = [name for name in BACKENDS if not (GPU and name == "torch")]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Several tiles in a row, several rows in a cache, though the vocabulary is small."""
    monkeypatch.setattr(triton_backend, "TILE", 16)
    monkeypatch.setattr(triton_backend, "HIDDEN_TILE", 4)
    monkeypatch.setattr(row_statistics, "CACHED_BYTES", 3 * 4 * 40)


@pytest.mark.parametrize("backend", NAMES)
@given(seed=st.integers(0, 10_000), vocabulary=st.integers(5, 70), stops=st.booleans())
@settings(max_examples=12)
def test_a_step_is_that_of_the_plain_functions(backend, seed, vocabulary, stops):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_backend, "TILE", 16)
        Case(seed, vocabulary, stops=stops).check(backend)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_logits_are_taken_as_they_are(backend, dtype):
    Case(3, dtype=dtype).check(backend)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("chunk", [1, 4])
def test_chunks_of_rows_change_nothing(backend, chunk, monkeypatch):
    # One row at a time through the filter as well.
    monkeypatch.setattr(batched_module, "CHUNK", 40)
    Case(5).check(backend, chunk=chunk)
