"""The losses of masked-token prediction, token by token and differentiable.

One definition for evaluation, for training from scratch and for recovery: which logits predict which tokens, the
cross-entropy of these, their divergence from a teacher's predictions, and the weight of a token in the ELBO.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from sinkprune_plugin.diffusion.families import DiffusionSpec
from sinkprune_plugin.errors import UsageError

__all__ = ["TopPredictions", "divergence", "elbo_weights", "negative_log_likelihood", "predictions", "top_predictions"]

# Predictions that are held in float32 at a time: 1024 × 126 464 floats are half a GB for LLaDA-8B.
ROWS_PER_CHUNK = 1024


@dataclass(frozen=True)
class TopPredictions:
    """The k most likely tokens of each prediction; what is left is one more outcome, "another token".

    :param ids: (K, k) int64 token ids
    :param log_probabilities: (K, k) float32, of the whole vocabulary's softmax
    """

    ids: torch.Tensor
    log_probabilities: torch.Tensor

    def remainder(self) -> torch.Tensor:
        """(K, 1) float32, log of the probability of all other tokens together."""
        return _log_remainder(self.log_probabilities)


def predictions(logits: torch.Tensor, corrupted: torch.Tensor, spec: DiffusionSpec) -> torch.Tensor:
    """The logits that predict the corrupted tokens.

    :param logits: (B, T, V) output of the model
    :param corrupted: (B, T) bool, on any device
    :param spec: the model's diffusion spec
    :return: (K, V) logits, one row for each corrupted token in row-major order, in the dtype of ``logits``
    """
    row, position = corrupted.to(logits.device).nonzero(as_tuple=True)
    # Dream: the logit that predicts token i is at i - 1; the first token has none and keeps its own.
    return logits[row, (position - spec.logit_shift).clamp(min=0)]


def negative_log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each prediction, in float32: a log-sum-exp over a large vocabulary loses digits in bfloat16.

    :param logits: (K, V)
    :param targets: (K,) int64 true tokens
    :return: (K,) float32, nats
    """
    return _in_chunks(lambda part, target: F.cross_entropy(part.float(), target, reduction="none"), logits, targets)


def divergence(logits: torch.Tensor, teacher: torch.Tensor | TopPredictions, temperature: float = 1.0) -> torch.Tensor:
    """Kullback-Leibler divergence KL(teacher ‖ student) of each prediction.

    With a temperature τ both distributions are those of logits / τ, and the result is multiplied by τ², so that
    gradients keep their size ("Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2).

    :param logits: (K, V) of the student
    :param teacher: (K, V) logits; or the most likely tokens, where all others count as one outcome, which makes the
        result a lower bound of the divergence
    :param temperature: τ; must be 1 with :class:`TopPredictions`
    :return: (K,) float32, nats
    :raises UsageError: for a temperature that isn't positive, or not 1 where it must be
    """
    if not temperature > 0:
        raise UsageError(f"temperature is {temperature:g}; it must be positive")
    if isinstance(teacher, TopPredictions):
        if temperature != 1.0:
            raise UsageError(
                f"temperature {temperature:g} needs the teacher's whole distribution, and only its "
                f"{teacher.ids.shape[1]} most likely tokens are kept; use temperature 1, or the teacher itself"
            )
        known = torch.cat([teacher.log_probabilities.float(), teacher.remainder()], dim=1)
        return _in_chunks(_divergence_of_top, logits, teacher.ids, known)

    def whole(part: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        student = F.log_softmax(part.float() / temperature, dim=-1)
        target = F.log_softmax(wanted.float() / temperature, dim=-1)
        return F.kl_div(student, target, reduction="none", log_target=True).sum(dim=-1) * temperature**2

    return _in_chunks(whole, logits, teacher)


def top_predictions(logits: torch.Tensor, count: int) -> TopPredictions:
    """The most likely tokens of each prediction.

    :param logits: (K, V)
    :param count: k; at most V - 1, so that there are others
    :return: ids and log-probabilities, the most likely first
    """
    ids, values = [], []
    for part in logits.split(ROWS_PER_CHUNK):
        found = F.log_softmax(part.float(), dim=-1).topk(min(count, logits.shape[1] - 1), dim=-1)
        ids.append(found.indices)
        values.append(found.values)
    return TopPredictions(torch.cat(ids), torch.cat(values))


def elbo_weights(corrupted: torch.Tensor, p_mask: torch.Tensor, bound: float | None = None) -> torch.Tensor:
    """Weight of each corrupted token in the negative ELBO: 1 / p_mask of its row, as in arXiv 2502.09992, equation 3.

    :param corrupted: (B, T) bool
    :param p_mask: (B,) float32 mask probabilities
    :param bound: largest weight; without one a window with one corrupted token may outweigh all others of a batch
    :return: (K,) float32, in row-major order
    """
    weights = p_mask.float().reciprocal()
    if bound is not None:
        weights = weights.clamp(max=bound)
    return weights.repeat_interleave(corrupted.sum(dim=1))


def _divergence_of_top(part: torch.Tensor, ids: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    student = F.log_softmax(part.float(), dim=-1).gather(1, ids)
    student = torch.cat([student, _log_remainder(student)], dim=1)
    return F.kl_div(student, known, reduction="none", log_target=True).sum(dim=-1)


def _log_remainder(log_probabilities: torch.Tensor) -> torch.Tensor:
    # The sum may round to 1; the smallest float32 step below it keeps the logarithm finite.
    total = log_probabilities.float().exp().sum(dim=1, keepdim=True).clamp(max=1.0 - 2.0**-24)
    return torch.log1p(-total)


def _in_chunks(function: Callable[..., torch.Tensor], logits: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """Apply a function to a few rows at a time; for gradients each chunk is computed again, not kept in float32."""
    others = tuple(other.to(logits.device) for other in others)
    parts = zip(logits.split(ROWS_PER_CHUNK), *(other.split(ROWS_PER_CHUNK) for other in others), strict=True)
    again = logits.requires_grad and torch.is_grad_enabled() and len(logits) > ROWS_PER_CHUNK
    results = [checkpoint(function, *part, use_reentrant=False) if again else function(*part) for part in parts]
    return torch.cat(results) if results else logits.new_zeros(0, dtype=torch.float32)
