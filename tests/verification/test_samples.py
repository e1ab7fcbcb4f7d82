"""Measures of written answers against plain counting."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkprune_plugin.verification.samples import distinct_n, repetition


@given(st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=5), st.integers(1, 4))
@settings(deadline=None, max_examples=200)
def test_distinct_and_repetition_against_counting(answers, n):
    grams, again = [], 0
    for answer in answers:
        seen = []
        for start in range(len(answer)):
            gram = answer[start : start + n]
            if len(gram) < n:
                continue
            again += gram in seen
            seen.append(gram)
        grams += seen
    unique = []
    for gram in grams:
        if gram not in unique:
            unique.append(gram)
    assert distinct_n(answers, n) == pytest.approx(len(unique) / len(grams) if grams else 0)
    assert repetition(answers, n) == pytest.approx(again / len(grams) if grams else 0)


def test_agreement_along_the_trajectory():
    from sinkprune_plugin.verification.samples import _along

    mask = 9
    rng = random.Random(0)
    final = [rng.randrange(5) for _ in range(10)]
    # Both write one token per step from the left; the second is wrong at the last five.
    dense = torch.tensor([[final[: step + 1] + [mask] * (9 - step) for step in range(10)]])
    pruned = dense.clone()
    pruned[0, :, 5:] = torch.where(pruned[0, :, 5:] == mask, mask, 7)
    expected = [1.0] * 5 + [5 / (6 + step) for step in range(5)]
    assert _along(dense, pruned, mask) == pytest.approx(expected)
