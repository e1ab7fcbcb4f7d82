"""What each masked position would become, and how sure the model is of it."""

import torch

from sinkprune_plugin.sampling.noise import gumbel_argmax, uniform_noise
from sinkprune_plugin.sampling.options import REMASKINGS

__all__ = ["propose"]

LOW_CONFIDENCE, RANDOM, MARGIN, ENTROPY = (
    REMASKINGS.index(name) for name in ("low_confidence", "random", "margin", "entropy")
)
# Keeps the noise of random remasking apart from that of the tokens.
_RANDOM_STREAM = 0x5EED


def propose(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    remasking: torch.Tensor,
    seed: torch.Tensor,
    step: torch.Tensor,
    position: torch.Tensor,
    mask_token_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Propose a token for each row.

    The mask token itself is excluded. The published sampler may propose it, and then leaves a mask in its output or
    fills it in a later block; where the model doesn't predict the mask token, the two are equal.

    :param logits: (R, V) floating point
    :param temperature: (R,) float64; 0 is greedy
    :param top_k: (R,) int64; 0 keeps all
    :param top_p: (R,) float64; 1 keeps all
    :param remasking: (R,) int64, index into :data:`~sinkprune_plugin.sampling.options.REMASKINGS`
    :param seed: (R,) int64
    :param step: (R,) int64, number of the noise's step
    :param position: (R,) int64, absolute position in prompt and canvas
    :param mask_token_id: the mask token
    :return: (R,) int64 tokens and (R,) float64 confidence, higher is surer: the token's probability (low_confidence), a
        random number, the difference of the two highest probabilities (margin) or the negative entropy (entropy), all
        of the softmax without noise, temperature or filter
    """
    logits = logits.float().index_fill(1, torch.tensor([mask_token_id], device=logits.device), -torch.inf)
    tokens = gumbel_argmax(_filtered(logits, top_k, top_p), temperature, seed, step, position)
    probabilities = torch.softmax(logits.double(), dim=-1)
    chosen = probabilities.gather(1, tokens[:, None])[:, 0]
    two = probabilities.topk(2, dim=-1).values
    entropy = torch.special.entr(probabilities).sum(dim=-1)
    noise = uniform_noise(seed ^ _RANDOM_STREAM, step, position, 1)[:, 0]
    confidence = torch.where(remasking == RANDOM, noise, chosen)
    confidence = torch.where(remasking == MARGIN, two[:, 0] - two[:, 1], confidence)
    return tokens, torch.where(remasking == ENTROPY, -entropy, confidence)


def _filtered(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Exclude what is not among the top_k likeliest tokens, or not in the smallest set with probability top_p."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    kept = (top_k[:, None] == 0) | (rank < top_k[:, None])
    probabilities = torch.softmax(ordered.double(), dim=-1)
    # A token stays if those before it have less than top_p; so the likeliest always stays.
    kept &= (top_p[:, None] >= 1) | (probabilities.cumsum(dim=-1) - probabilities < top_p[:, None])
    return torch.full_like(logits, -torch.inf).scatter(1, order, torch.where(kept, ordered, -torch.inf))
