"""The Monte-Carlo estimate of an answer's log-likelihood, against sums over everything that can be masked."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkprune_plugin.diffusion import sample_generator
from sinkprune_plugin.diffusion.families import DiffusionFamily, DiffusionSpec
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.lm_eval.conditional_likelihood import answer_log_likelihoods, masked_counts

VOCABULARY, MASK = 13, 12
PLAIN = DiffusionSpec(DiffusionFamily("plain", ("plain",)), MASK, VOCABULARY)
SHIFTED = DiffusionSpec(
    DiffusionFamily("shifted", ("shifted",), keep_first=True, keep_last=True, logit_shift=1), MASK, VOCABULARY
)


class Model(torch.nn.Module):
    """Logits of a position depend on the whole sequence, in both directions, and on the position."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.near = torch.randn(VOCABULARY, VOCABULARY, generator=generator)
        self.far = torch.randn(VOCABULARY, VOCABULARY, generator=generator)
        self.device = torch.device("cpu")
        self.rows = []

    def forward(self, input_ids):
        self.rows += input_ids.tolist()
        whole = (self.far[input_ids] * torch.arange(1, input_ids.shape[1] + 1)[:, None] / 7).sum(dim=1, keepdim=True)
        return SimpleNamespace(logits=self.near[input_ids] + whole.sin())


def log_p(model, tokens, hidden, place, shift):
    """log p of the token at a position while those at ``hidden`` are masked."""
    noisy = [MASK if position in hidden else token for position, token in enumerate(tokens)]
    logits = model(torch.tensor([noisy])).logits[0, place - shift]
    return torch.log_softmax(logits.double(), dim=-1)[tokens[place]].item()


def direct(model, context, answer, spec, mc_num, seed, ending=()):
    """The estimate written plainly: one sample at a time, every masked token separately."""
    tokens, length = [*context, *answer, *ending], len(answer)
    generator = sample_generator(seed, mc_num, torch.tensor(tokens))
    start = torch.rand((), generator=generator, dtype=torch.float64).item() * length
    keys = torch.rand(mc_num, length, generator=generator).tolist()
    total = 0.0
    for sample in range(mc_num):
        count = int((start + sample * (length / mc_num)) % length) + 1
        hidden = [len(context) + place for place in sorted(range(length), key=keys[sample].__getitem__)[:count]]
        total += sum(log_p(model, tokens, hidden, place, spec.logit_shift) for place in hidden) * length / count
    return total / mc_num


def exact(model, context, answer, spec, ending=()):
    """Equation 6 of arXiv 2502.09992 with every number and every subset, instead of samples."""
    tokens, length, begin = [*context, *answer, *ending], len(answer), len(context)
    total = 0.0
    for count in range(1, length + 1):
        subsets = list(itertools.combinations(range(begin, begin + length), count))
        total += sum(
            log_p(model, tokens, hidden, place, spec.logit_shift) * length / count / len(subsets)
            for hidden in subsets
            for place in hidden
        )
    return total / length


@settings(deadline=None, max_examples=30)
@given(
    context=st.lists(st.integers(0, MASK - 1), min_size=1, max_size=5),
    length=st.integers(1, 5),
    mc_num=st.integers(1, 9),
    batch_size=st.integers(1, 7),
    seed=st.integers(0, 9),
    shifted=st.booleans(),
)
def test_equals_the_plain_computation(context, length, mc_num, batch_size, seed, shifted):
    spec, ending = (SHIFTED, (3,)) if shifted else (PLAIN, ())
    answers = torch.randint(0, MASK, (3, length), generator=torch.Generator().manual_seed(seed)).tolist()
    model = Model()
    found = answer_log_likelihoods(
        model, context, answers, spec, mc_num=mc_num, batch_size=batch_size, seed=seed, ending=ending
    )
    for score, answer in zip(found, answers, strict=True):
        # Batched against single rows in float32.
        assert score == pytest.approx(direct(model, context, answer, spec, mc_num, seed, ending), rel=1e-5)


@pytest.mark.parametrize("spec", [PLAIN, SHIFTED], ids=lambda spec: spec.name)
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_the_mean_over_seeds_is_the_exact_sum(spec, length):
    model, context, answer = Model(), [4, 9, 1], [7, 2, 0, 5][:length]
    scores = [
        answer_log_likelihoods(model, context, [answer], spec, mc_num=6, seed=seed, ending=(3,))[0]
        for seed in range(150)
    ]
    expected = exact(model, context, answer, spec, ending=(3,))
    mean, error = torch.tensor(scores).mean().item(), torch.tensor(scores).std().item() / len(scores) ** 0.5
    # Four standard errors; with one token every sample is exact up to float32.
    assert abs(mean - expected) < 4 * error + 1e-5 * abs(expected)


def test_neither_the_other_answers_nor_their_order_change_a_score():
    model, context = Model(), [4, 9, 1]
    answers = [[7, 2, 0], [5, 5, 6], [1, 2, 3]]
    together = answer_log_likelihoods(model, context, answers, PLAIN, mc_num=8)
    backwards = answer_log_likelihoods(model, context, answers[::-1], PLAIN, mc_num=8)
    alone = [answer_log_likelihoods(model, context, [answer], PLAIN, mc_num=8)[0] for answer in answers]
    # Other batches, other rounding in float32.
    assert together == pytest.approx(backwards[::-1], rel=1e-6)
    assert together == pytest.approx(alone, rel=1e-6)


def test_the_seed_changes_a_score():
    # Ten tokens have a thousand subsets, so two seeds hardly draw the same.
    answer = [7, 2, 0, 5, 5, 6, 1, 2, 3, 4]
    scores = {answer_log_likelihoods(Model(), [4], [answer], PLAIN, mc_num=2, seed=seed)[0] for seed in range(5)}
    assert len(scores) == 5


def test_four_letters_cost_one_row():
    model = Model()
    answer_log_likelihoods(model, [4, 9], [[0], [1], [2], [3]], PLAIN, mc_num=128)
    assert model.rows == [[4, 9, MASK]]


def test_only_the_answer_is_masked():
    model = Model()
    answer_log_likelihoods(model, [4, 9], [[0, 1, 2]], SHIFTED, mc_num=64, ending=(3,))
    assert {tuple(row[:2] + row[-1:]) for row in model.rows} == {(4, 9, 3)}
    assert {row[2:5].count(MASK) for row in model.rows} == {1, 2, 3}
    # All seven ways to mask at least one of three tokens, each once.
    assert len(model.rows) == len({tuple(row) for row in model.rows}) == 7


def test_guidance_pushes_away_from_the_masked_context():
    model, context, answer = Model(), [4, 9], [7]
    (found,) = answer_log_likelihoods(model, context, [answer], PLAIN, cfg=0.5)
    conditional, without = (model(torch.tensor([row])).logits[0, 2] for row in ([4, 9, MASK], [MASK] * 3))
    expected = torch.log_softmax(without + 1.5 * (conditional - without), dim=-1)[7].item()
    # Single rows in float32 on both sides.
    assert found == pytest.approx(expected, rel=1e-5)


@settings(deadline=None, max_examples=50)
@given(length=st.integers(1, 40), samples=st.integers(1, 60), seed=st.integers(0, 99))
def test_masked_counts_are_stratified(length, samples, seed):
    counts = masked_counts(length, samples, torch.Generator().manual_seed(seed)).tolist()
    assert len(counts) == samples
    for number in range(1, length + 1):
        # A grid of `samples` points over [0, length) has the floor or the ceiling of its share in each unit.
        assert samples // length <= counts.count(number) <= -(-samples // length)


@pytest.mark.parametrize(
    ("context", "answers", "spec", "message"),
    [
        ([1], [[]], PLAIN, r"the answers have \[0\] tokens"),
        ([1], [[1], [2, 3]], PLAIN, r"the answers have \[1, 2\] tokens"),
        ([], [[1]], SHIFTED, "needs a token before the answer"),
        ([1], [[1]], SHIFTED, "keeps a sequence's last token; give an ending"),
    ],
)
def test_answers_that_cannot_be_scored_are_refused(context, answers, spec, message):
    with pytest.raises(UsageError, match=message):
        answer_log_likelihoods(Model(), context, answers, spec)


def test_logits_that_are_not_finite_are_reported():
    model = Model()
    model.near[MASK, 0] = float("nan")
    with pytest.raises(UsageError, match="NaN or Inf"):
        answer_log_likelihoods(model, [1], [[2, 3]], PLAIN)
