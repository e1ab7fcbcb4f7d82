"""Counted noise: its value, its independence of the batch, its statistics; and drawing tokens with it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkprune_plugin.sampling import noise
from sinkprune_plugin.sampling.noise import gumbel_argmax, uniform_noise

WORD = (1 << 64) - 1
COUNTERS = st.integers(0, 2**63 - 1)


def tensor(*values):
    return torch.tensor(values, dtype=torch.int64)


def plain_mix(value):
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & WORD
    return value ^ (value >> 31)


def plain_noise(seed, step, position, column):
    golden = 0x9E3779B97F4A7C15
    key = plain_mix((seed + golden) & WORD)
    for counter in (step, position):
        key = plain_mix(key ^ ((counter + 1) * golden & WORD))
    bits = plain_mix((key + (column + 1) * golden) & WORD)
    return ((bits >> 12) + 0.5) / 2**52


def test_the_finaliser_is_that_of_splitmix64():
    # First outputs of SplitMix64 from state 1234567, as published with the reference implementation.
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    state = 1234567
    for output in outputs:
        state = (state + 0x9E3779B97F4A7C15) & WORD
        assert plain_mix(state) == output
        assert int(noise._mix(tensor(state - (state >> 63 << 64)))) & WORD == output


@given(COUNTERS, st.integers(0, 2**40), st.integers(-(2**40), 2**40), st.integers(1, 50))
@settings(deadline=None, max_examples=100)
def test_equals_the_hash_in_whole_numbers(seed, step, position, columns):
    row = uniform_noise(tensor(seed), tensor(step), tensor(position), columns)[0]
    assert row.tolist() == [plain_noise(seed, step, position, column) for column in range(columns)]


@given(st.lists(st.tuples(COUNTERS, st.integers(0, 500), st.integers(0, 5000)), min_size=1, max_size=12), st.data())
@settings(deadline=None, max_examples=50)
def test_a_row_depends_on_its_own_numbers_alone(rows, data):
    seed, step, position = torch.tensor(rows).T
    whole = uniform_noise(seed, step, position, 40)
    order = torch.tensor(data.draw(st.permutations(range(len(rows)))))
    cut = data.draw(st.integers(0, len(rows)))
    chosen = order[:cut]
    torch.testing.assert_close(
        uniform_noise(seed[chosen], step[chosen], position[chosen], 40), whole[chosen], rtol=0, atol=0
    )
    # Fewer columns are the first columns: the vocabulary's padding doesn't matter.
    torch.testing.assert_close(uniform_noise(seed, step, position, 7), whole[:, :7], rtol=0, atol=0)


def grid(seeds, steps, positions):
    """All combinations, in this order."""
    return [part.flatten() for part in torch.meshgrid(seeds, steps, positions, indexing="ij")]


def test_is_uniform_and_neighbours_are_independent():
    columns = 1000
    sample = uniform_noise(*grid(torch.arange(10), torch.arange(10), torch.arange(10)), columns)
    n = sample.numel()
    assert sample.min() > 0
    assert sample.max() < 1
    # Standard errors of n = 10^6 independent uniform numbers; five of them are exceeded once in two million times.
    assert abs(sample.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / n)
    assert abs(sample.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    counts = torch.histc(sample, 256, 0, 1)
    chi_square = float(((counts - n / 256) ** 2 / (n / 256)).sum())
    # Mean 255 and standard deviation sqrt(2 · 255).
    assert abs(chi_square - 255) < 5 * math.sqrt(510)
    cube = (sample - 0.5).view(10, 10, 10, columns) * math.sqrt(12)
    for axis in range(4):
        one, other = cube.narrow(axis, 0, cube.shape[axis] - 1), cube.narrow(axis, 1, cube.shape[axis] - 1)
        # The correlation of N independent pairs has the standard error 1/√N.
        assert abs((one * other).mean()) < 5 / math.sqrt(one.numel())


def test_no_two_places_share_a_number():
    # 10^6 numbers of 52 bits coincide once in 10^12 / 2^53 = 1/9000 samples by chance; this fixed one has none.
    sample = uniform_noise(*grid(torch.arange(5), torch.arange(20), torch.arange(100)), 100)
    assert len(sample.flatten().unique()) == sample.numel()


def test_extreme_bits_stay_inside_the_open_interval(monkeypatch):
    for bits in (0, -1):
        monkeypatch.setattr(noise, "_mix", lambda value, bits=bits: torch.full_like(value, bits))
        number = uniform_noise(tensor(0), tensor(0), tensor(0), 1).item()
        assert 0 < number < 1
        assert math.isfinite(-math.log(-math.log(number)))


def plain_gumbel(logits, temperature, u):
    """The published form, exp(logit) / (-log u)^temperature, in float64."""
    return (logits.double().exp() / (-u.log()) ** temperature).argmax()


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=50)
def test_tokens_are_those_of_the_published_form(seed):
    generator = torch.Generator().manual_seed(seed)
    rows, vocabulary = 6, 50
    logits = torch.randn(rows, vocabulary, generator=generator) * 4
    temperature = torch.tensor([0.0, 0.3, 1.0, 2.5, 0.0, 1.0], dtype=torch.float64)
    seeds, steps, positions = torch.randint(0, 1000, (3, rows), generator=generator)
    tokens = gumbel_argmax(logits, temperature, seeds, steps, positions)
    u = uniform_noise(seeds, steps, positions, vocabulary)
    expected = [
        plain_gumbel(row, hot, v) if hot > 0 else row.argmax()
        for row, hot, v in zip(logits, temperature, u, strict=True)
    ]
    assert tokens.tolist() == torch.stack(expected).tolist()


def test_greedy_takes_the_first_of_equals_in_the_logits_own_precision():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    assert gumbel_argmax(logits, torch.zeros(1).double(), *([tensor(0)] * 3)).tolist() == [1]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_those_of_the_softmax(temperature):
    # Drawing with exp(logit) / (-log u)^T is drawing from softmax(logit / T): the Gumbel-max theorem.
    n = 40_000
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -torch.inf])
    tokens = gumbel_argmax(
        logits.expand(n, -1),
        torch.full((n,), temperature, dtype=torch.float64),
        torch.full((n,), 3),
        torch.arange(n) % 100,
        torch.arange(n) // 100,
    )
    expected = n * torch.softmax(logits.double()[:5] / temperature, 0)
    counts = torch.bincount(tokens, minlength=6).double()
    assert counts[5] == 0
    chi_square = float(((counts[:5] - expected) ** 2 / expected).sum())
    # Four degrees of freedom: beyond 33 once in a million times.
    assert chi_square < 33


def test_chunks_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(11, 30, generator=generator)
    arguments = (logits, torch.ones(11).double(), torch.arange(11), torch.arange(11), torch.arange(11))
    whole = gumbel_argmax(*arguments)
    monkeypatch.setattr(noise, "CHUNK", 90)
    assert gumbel_argmax(*arguments).tolist() == whole.tolist()
    monkeypatch.setattr(noise, "CHUNK", 1)
    assert gumbel_argmax(*arguments).tolist() == whole.tolist()


def test_scale_and_large_temperatures_dont_overflow():
    logits = torch.tensor([[1e30, -1e30, 3e38]])
    for temperature in (1e-300, 100.0):
        token = gumbel_argmax(logits, torch.tensor([temperature], dtype=torch.float64), *([tensor(5)] * 3))
        assert token.tolist() == [2]
