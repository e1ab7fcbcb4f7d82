import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkprune_plugin.diffusion import corrupt, mask_probability, resolve_diffusion, sample_generator
from sinkprune_plugin.errors import UsageError

MASK = 2
VOCABULARY = 64
LLADA = resolve_diffusion({"model_type": "llada", "vocab_size": VOCABULARY, "mask_token_id": MASK})
DREAM = resolve_diffusion({"model_type": "Dream", "vocab_size": VOCABULARY, "mask_token_id": MASK})
EPS = 1e-3


def token_ids(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def run(ids, t=0.5, spec=LLADA, seed=0, step=0, valid=None):
    real = [row if valid is None else row[valid[i]] for i, row in enumerate(ids)]
    generators = [sample_generator(seed, step, row) for row in real]
    return corrupt(ids, t, spec, noise_eps=EPS, generators=generators, attention_mask=valid)


@pytest.mark.parametrize(("t", "expected"), [(1.0, 1.0), (0.5, 0.5005), (0.1, 0.1009)])
def test_mask_probability(t, expected):
    assert math.isclose(mask_probability(t, EPS), expected, rel_tol=1e-12)


@given(st.integers(1, 5), st.integers(1, 40), st.floats(0.01, 1.0), st.integers(0, 2**40), st.integers(0, 50))
@settings(deadline=None, max_examples=60)
def test_what_comes_out_fits_together(batch, length, t, seed, step):
    ids = token_ids(batch, length)
    kept = ids.clone()
    result = run(ids, t, seed=seed, step=step)
    assert torch.equal(ids, kept), "the input was written to"
    assert torch.equal(result.noisy_ids, torch.where(result.corrupted, MASK, ids))
    assert result.noisy_ids.dtype == torch.int64
    assert result.corrupted.dtype == torch.bool
    assert torch.equal(result.p_mask, torch.full((batch,), mask_probability(t, EPS), dtype=torch.float32))


def test_all_is_masked_at_the_last_timestep():
    assert (run(token_ids(4, 50), 1.0).noisy_ids == MASK).all()


@pytest.mark.parametrize("t", [0.02, 0.1, 0.5, 0.9])
def test_tokens_are_masked_at_the_rate_of_the_timestep(t):
    ids = token_ids(64, 512)
    count = run(ids, t).corrupted.sum().item()
    p, n = mask_probability(t, EPS), ids.numel()
    # Five standard deviations of the binomial: with a fixed seed this can't flake, and a rate off by 0.014 fails.
    assert abs(count - n * p) < 5 * math.sqrt(n * p * (1 - p))


def test_positions_are_independent():
    corrupted = run(token_ids(512, 64), 0.5).corrupted.double()
    # Correlations of independent coins over 512 rows have a standard deviation of 1/sqrt(512); five of them.
    correlation = torch.corrcoef(corrupted.T) - torch.eye(64)
    assert correlation.abs().max() < 5 / math.sqrt(512)


@given(st.integers(2, 6), st.integers(8, 30), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_noise_does_not_depend_on_batch_or_order(batch, length, random):
    ids = token_ids(batch, length)
    together = run(ids).noisy_ids
    order = list(range(batch))
    random.shuffle(order)
    assert torch.equal(run(ids[order]).noisy_ids, together[order])
    for row in range(batch):
        assert torch.equal(run(ids[row : row + 1]).noisy_ids, together[row : row + 1])


@given(st.integers(1, 30), st.integers(0, 20), st.booleans(), st.sampled_from([LLADA, DREAM]))
@settings(deadline=None, max_examples=60)
def test_padding_is_never_corrupted_and_changes_nothing(length, padding, left, spec):
    ids = token_ids(1, length)
    pad = torch.ones(1, padding, dtype=torch.int64)
    padded = torch.cat([pad, ids] if left else [ids, pad], dim=1)
    valid = torch.cat([pad * 0, ids] if left else [ids, pad * 0], dim=1) > 0
    result = run(padded, 0.7, spec, valid=valid)
    assert not result.corrupted[~valid].any()
    assert torch.equal(result.noisy_ids[valid], run(ids, 0.7, spec).noisy_ids[0])


@pytest.mark.parametrize("left", [False, True])
def test_dream_keeps_the_first_and_the_last_real_token(left):
    ids = token_ids(3, 10)
    valid = torch.tensor([[1] * 10, [1] * 6 + [0] * 4, [1] * 2 + [0] * 8]).bool()
    if left:
        valid = valid.flip(1)
    corrupted = run(ids, 1.0, DREAM, valid=valid).corrupted
    for row, length in enumerate((10, 6, 2)):
        # At t = 1 every token that may be corrupted is.
        expected = [False] + [True] * (length - 2) + [False]
        assert corrupted[row, valid[row]].tolist() == expected
        assert not corrupted[row, ~valid[row]].any()


def test_dream_draws_the_same_noise_inside():
    ids = token_ids(4, 40)
    assert torch.equal(run(ids, spec=DREAM).corrupted[:, 1:-1], run(ids, spec=LLADA).corrupted[:, 1:-1])


def test_seed_step_and_sample_all_matter():
    ids = token_ids(1, 64)
    base = run(ids, seed=1, step=2).corrupted
    assert torch.equal(base, run(ids, seed=1, step=2).corrupted)
    other = ids.clone()
    other[0, 0] += 1
    for changed in (run(ids, seed=2, step=2), run(ids, seed=1, step=3), run(ids, seed=12, step=0), run(other, seed=1)):
        assert not torch.equal(base, changed.corrupted)


def test_generator_seed_is_fixed_for_all_time():
    # Literals: a change here changes every user's masks, so it needs a note in the changelog.
    ids = torch.arange(3, 11)
    assert sample_generator(0, 0, ids).initial_seed() == 566233146786124994
    assert sample_generator(0, 1, ids.to(torch.int32)).initial_seed() == 3309817964839947657


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run(token_ids(3, 20))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    changed = run(token_ids(3, 20)).noisy_ids
    torch.manual_seed(7)
    assert torch.equal(run(token_ids(3, 20)).noisy_ids, changed)


def test_one_timestep_a_row():
    ids = token_ids(3, 30)
    mixed = run(ids, [0.2, 0.5, 1.0])
    for row, t in enumerate((0.2, 0.5, 1.0)):
        alone = run(ids[row : row + 1], t)
        assert torch.equal(mixed.noisy_ids[row], alone.noisy_ids[0])
        assert mixed.p_mask[row] == alone.p_mask[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestep": 0.0}, r"timestep is 0.0; it must be in \(0, 1\]"),
        ({"timestep": 1.5}, "timestep is 1.5"),
        ({"timestep": [0.5]}, "1 timesteps for a batch of 2"),
        ({"noise_eps": 1.0}, r"noise_eps is 1.0; it must be in \[0, 1\)"),
        ({"noise_eps": -0.1}, "noise_eps is -0.1"),
        ({"generators": []}, "0 generators for a batch of 2"),
        ({"input_ids": torch.zeros(8, dtype=torch.int64)}, r"shape \(8,\)"),
        ({"attention_mask": torch.ones(2, 7)}, r"attention_mask has shape \(2, 7\), input_ids \(2, 8\)"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(changes, message):
    arguments = {
        "input_ids": token_ids(2, 8),
        "timestep": 0.5,
        "spec": LLADA,
        "noise_eps": EPS,
        "generators": [torch.Generator(), torch.Generator()],
    } | changes
    with pytest.raises(UsageError, match=message):
        corrupt(**arguments)
