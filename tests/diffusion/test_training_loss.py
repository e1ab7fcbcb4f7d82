"""Losses of masked-token prediction against formulas written out in float64."""

import pytest
import torch

from sinkprune_plugin.diffusion import families, training_loss
from sinkprune_plugin.diffusion.families import DiffusionSpec
from sinkprune_plugin.diffusion.training_loss import (
    TopPredictions,
    divergence,
    elbo_weights,
    negative_log_likelihood,
    predictions,
    top_predictions,
)
from sinkprune_plugin.errors import UsageError

FAMILIES = {family.name: family for family in families()}


def case(rows: int = 9, vocab: int = 17) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    student = 3 * torch.randn(rows, vocab, generator=generator)
    teacher = 3 * torch.randn(rows, vocab, generator=generator)
    return student, teacher, torch.randint(vocab, (rows,), generator=generator)


def softmax(logits: torch.Tensor) -> torch.Tensor:
    exponentials = (logits.double() - logits.double().max(dim=1, keepdim=True).values).exp()
    return exponentials / exponentials.sum(dim=1, keepdim=True)


@pytest.mark.parametrize(("family", "shift"), [("llada", 0), ("dream", 1)])
def test_the_logits_that_predict_a_token_follow_the_family(family: str, shift: int) -> None:
    logits = torch.arange(2 * 4 * 3).reshape(2, 4, 3).float()
    corrupted = torch.tensor([[False, True, False, True], [False, False, True, False]])
    found = predictions(logits, corrupted, DiffusionSpec(FAMILIES[family], 2, 3))
    assert torch.equal(found, torch.stack([logits[0, 1 - shift], logits[0, 3 - shift], logits[1, 2 - shift]]))


def test_cross_entropy() -> None:
    student, _, targets = case()
    wanted = -softmax(student)[torch.arange(len(targets)), targets].log()
    # float32 sums of 17 terms.
    assert torch.allclose(negative_log_likelihood(student, targets).double(), wanted, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_of_whole_distributions(temperature: float) -> None:
    student, teacher, _ = case()
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    wanted = (p * (p.log() - q.log())).sum(dim=1) * temperature**2
    assert torch.allclose(divergence(student, teacher, temperature).double(), wanted, atol=1e-5)


def test_divergence_from_the_most_likely_tokens_counts_the_others_as_one() -> None:
    student, teacher, _ = case()
    top = top_predictions(teacher, 4)
    p, q = softmax(teacher), softmax(student)
    order = p.topk(4, dim=1).indices
    assert torch.equal(top.ids, order)
    p, q = (torch.cat([x.gather(1, order), 1 - x.gather(1, order).sum(dim=1, keepdim=True)], dim=1) for x in (p, q))
    wanted = (p * (p.log() - q.log())).sum(dim=1)
    found = divergence(student, top)
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    assert bool((found <= divergence(student, teacher) + 1e-6).all())
    # Of 17 tokens at most 16 are kept, and then nothing is lost.
    assert torch.allclose(divergence(student, top_predictions(teacher, 99)), divergence(student, teacher), atol=1e-5)


def test_a_certain_teacher_leaves_the_divergence_finite() -> None:
    student = torch.tensor([[90.0, 0.0, 0.0]], requires_grad=True)
    found = divergence(student, top_predictions(torch.tensor([[99.0, 0.0, 0.0]]), 1))
    found.sum().backward()
    assert abs(found.item()) < 1e-5
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


@pytest.mark.parametrize("kind", ["likelihood", "whole", "top"])
def test_chunks_change_neither_values_nor_gradients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, targets = case(rows=11)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        logits = student.clone().requires_grad_()
        if kind == "likelihood":
            losses = negative_log_likelihood(logits, targets)
        else:
            losses = divergence(logits, teacher if kind == "whole" else top_predictions(teacher, 3))
        losses.sum().backward()
        assert logits.grad is not None
        return losses.detach(), logits.grad

    whole = run()
    monkeypatch.setattr(training_loss, "ROWS_PER_CHUNK", 4)
    for one, other in zip(whole, run(), strict=True):
        assert torch.equal(one, other)


def test_no_corrupted_token_is_no_loss() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    assert negative_log_likelihood(logits, torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_weights_of_the_elbo() -> None:
    corrupted = torch.tensor([[True, False, True], [False, True, False]])
    p_mask = torch.tensor([0.5, 0.01])
    assert elbo_weights(corrupted, p_mask).tolist() == pytest.approx([2.0, 2.0, 100.0])
    assert elbo_weights(corrupted, p_mask, bound=20.0).tolist() == pytest.approx([2.0, 2.0, 20.0])


def test_wrong_temperatures() -> None:
    student, teacher, _ = case()
    with pytest.raises(UsageError, match="temperature is 0; it must be positive"):
        divergence(student, teacher, 0.0)
    with pytest.raises(UsageError, match="temperature 2 needs the teacher's whole distribution, and only its 3 "):
        divergence(student, TopPredictions(*(torch.zeros(9, 3).long(), torch.zeros(9, 3))), 2.0)
