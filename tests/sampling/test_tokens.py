"""Proposals for masked positions: tokens, filters and confidences against plain references."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkprune_plugin.sampling import tokens as tokens_module
from sinkprune_plugin.sampling.noise import gumbel_argmax, uniform_noise
from sinkprune_plugin.sampling.options import REMASKINGS
from sinkprune_plugin.sampling.tokens import Needs, _filtered, propose

MASK = 3
# Confidences are sums of at most a few dozen float64 terms near 1; in another order they differ by some 2^-53 each.
CLOSE = {"rtol": 0, "atol": 1e-13}


def random_rows(seed, rows, vocabulary):
    """Logits and per-row options of a mixed batch."""
    generator = torch.Generator().manual_seed(seed)

    def pick(values, dtype):
        return torch.tensor(values, dtype=dtype)[torch.randint(len(values), (rows,), generator=generator)]

    return {
        "logits": torch.randn(rows, vocabulary, generator=generator) * 3,
        "temperature": pick([0.0, 0.0, 0.7, 1.5], torch.float64),
        "top_k": pick([0, 1, 3, vocabulary + 5], torch.int64),
        "top_p": pick([1.0, 0.3, 0.8], torch.float64),
        "remasking": pick(range(4), torch.int64),
        "seed": torch.randint(0, 2**40, (rows,), generator=generator),
        "step": torch.randint(0, 100, (rows,), generator=generator),
        "position": torch.randint(0, 100, (rows,), generator=generator),
    }


def plain_filter(row, top_k, top_p):
    """Ids that may be drawn, of one row of logits."""
    order = sorted(range(len(row)), key=lambda i: -row[i])
    largest = max(row)
    weight = [math.exp(row[i] - largest) for i in order]
    total, before, kept = sum(weight), 0.0, []
    for rank, i in enumerate(order):
        if (top_k == 0 or rank < top_k) and (top_p >= 1 or before / total < top_p):
            kept.append(i)
        before += weight[rank]
    return sorted(kept)


def plain_propose(row, temperature, top_k, top_p, remasking, seed, step, position):
    """One row, in Python's floats where it matters."""
    row = row.clone()
    row[MASK] = -torch.inf
    where = [torch.tensor([value]) for value in (seed, step, position)]
    allowed = torch.full_like(row, -torch.inf)
    kept = plain_filter(row.tolist(), top_k, top_p)
    allowed[kept] = row[kept]
    token = int(gumbel_argmax(allowed[None], torch.tensor([temperature], dtype=torch.float64), *where))
    exponentials = [math.exp(value) for value in row.tolist()]
    probabilities = [value / sum(exponentials) for value in exponentials]
    first, second = sorted(probabilities)[:-3:-1]
    confidence = {
        "low_confidence": probabilities[token],
        "random": None,
        "margin": first - second,
        "entropy": sum(p * math.log(p) for p in probabilities if p > 0),
    }[REMASKINGS[remasking]]
    return token, confidence


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(5, 40))
@settings(deadline=None, max_examples=80)
def test_a_mixed_batch_equals_one_row_at_a_time(seed, rows, vocabulary):
    batch = random_rows(seed, rows, vocabulary)
    tokens, confidence = propose(**batch, mask_token_id=MASK)
    assert tokens.dtype == torch.int64
    assert confidence.dtype == torch.float64
    for index in range(rows):
        one = {name: values[index] for name, values in batch.items()}
        expected_token, expected = plain_propose(one.pop("logits"), **{name: v.item() for name, v in one.items()})
        assert tokens[index] == expected_token
        if expected is not None:
            torch.testing.assert_close(confidence[index].item(), expected, **CLOSE)


@given(st.integers(0, 10_000), st.integers(1, 9))
@settings(deadline=None, max_examples=40)
def test_no_row_depends_on_the_others(seed, rows):
    batch = random_rows(seed, rows, 30)
    tokens, confidence = propose(**batch, mask_token_id=MASK)
    for index in range(rows):
        token, sure = propose(**{name: values[index : index + 1] for name, values in batch.items()}, mask_token_id=MASK)
        # Bit for bit: a request must not depend on its neighbours.
        assert (token.item(), sure.item()) == (tokens[index].item(), confidence[index].item())


@pytest.mark.parametrize("name", REMASKINGS)
@pytest.mark.parametrize("hot", [True, False])
@pytest.mark.parametrize("filters", [True, False])
def test_what_no_row_needs_changes_nothing(name, hot, filters):
    batch = random_rows(1, 20, 30)
    remasking = REMASKINGS.index(name)
    batch["remasking"] = torch.full((20,), remasking)
    if not hot:
        batch["temperature"] = torch.zeros(20, dtype=torch.float64)
    if not filters:
        batch |= {"top_k": torch.zeros(20, dtype=torch.int64), "top_p": torch.ones(20, dtype=torch.float64)}
    everything = propose(**batch, mask_token_id=MASK)
    needed = propose(**batch, mask_token_id=MASK, needs=Needs(hot, filters, (remasking,)))
    assert torch.equal(everything[0], needed[0])
    assert torch.equal(everything[1], needed[1])


def test_chunks_change_nothing(monkeypatch):
    batch = random_rows(2, 23, 30)
    whole = propose(**batch, mask_token_id=MASK)
    monkeypatch.setattr(tokens_module, "CHUNK", 5 * 30)
    parts = propose(**batch, mask_token_id=MASK)
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])


def test_the_mask_token_is_never_proposed_and_counts_for_nothing():
    batch = random_rows(3, 50, 20)
    batch["remasking"] = torch.zeros(50, dtype=torch.int64)
    batch["logits"][:, MASK] = 1000.0
    before = batch["logits"].clone()
    tokens, confidence = propose(**batch, mask_token_id=MASK)
    assert MASK not in tokens.tolist()
    assert torch.equal(batch["logits"], before)
    batch["logits"][:, MASK] = -1000.0
    again = propose(**batch, mask_token_id=MASK)
    assert torch.equal(again[0], tokens)
    assert torch.equal(again[1], confidence)


def test_random_confidence_has_noise_of_its_own():
    batch = random_rows(4, 200, 10)
    batch["remasking"] = torch.full((200,), REMASKINGS.index("random"))
    _, confidence = propose(**batch, mask_token_id=MASK)
    assert confidence.min() > 0
    assert confidence.max() < 1
    assert len(confidence.unique()) == 200
    drawn = uniform_noise(batch["seed"], batch["step"], batch["position"], 10)
    assert not (drawn == confidence[:, None]).any()


def test_bfloat16_logits_are_taken_as_they_are():
    batch = random_rows(5, 30, 25)
    batch["logits"] = batch["logits"].bfloat16()
    short = propose(**batch, mask_token_id=MASK)
    batch["logits"] = batch["logits"].float()
    exact = propose(**batch, mask_token_id=MASK)
    assert torch.equal(short[0], exact[0])
    assert torch.equal(short[1], exact[1])


@given(
    st.lists(st.sampled_from([-4.0, -1.0, 0.0, 0.5, 2.0]) | st.floats(-8, 8, width=32), min_size=1, max_size=15),
    st.integers(0, 17),
    # No sum of a few equal probabilities, where the order of additions would decide.
    st.sampled_from([0.0513, 0.3071, 0.5523, 0.9037, 0.9911, 1.0]),
)
@settings(deadline=None, max_examples=300)
def test_filters_keep_what_the_plain_definition_keeps(row, top_k, top_p):
    logits = torch.tensor([row])
    kept = _filtered(logits, torch.tensor([top_k]), torch.tensor([top_p], dtype=torch.float64))[0]
    finite = kept.isfinite()
    assert torch.equal(kept[finite], logits[0][finite])
    expected = plain_filter(logits[0].tolist(), top_k, top_p)
    assert finite.nonzero().flatten().tolist() == expected
    assert expected, "the likeliest always stays"


def test_a_filter_never_lets_the_others_through():
    rows = 2000
    logits = torch.tensor([3.0, 2.0, 1.0, -5.0, 0.5]).expand(rows, -1)
    tokens, _ = propose(
        logits,
        temperature=torch.full((rows,), 100.0, dtype=torch.float64),
        top_k=torch.full((rows,), 2),
        top_p=torch.ones(rows, dtype=torch.float64),
        remasking=torch.zeros(rows, dtype=torch.int64),
        seed=torch.arange(rows),
        step=torch.zeros(rows, dtype=torch.int64),
        position=torch.zeros(rows, dtype=torch.int64),
        mask_token_id=MASK,
    )
    # At such a temperature all that may be drawn is drawn about equally often.
    counts = torch.bincount(tokens, minlength=5).tolist()
    assert counts[2:] == [0, 0, 0]
    assert min(counts[:2]) > 800
