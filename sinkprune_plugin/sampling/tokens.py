"""The proposed token of each masked position, and the model's confidence in it."""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from sinkprune_plugin.sampling.noise import CHUNK, gumbel_argmax, uniform_noise
from sinkprune_plugin.sampling.options import REMASKINGS

__all__ = ["EVERYTHING", "Needs", "filter_cuts", "propose"]

LOW_CONFIDENCE, RANDOM, MARGIN, ENTROPY = (
    REMASKINGS.index(name) for name in ("low_confidence", "random", "margin", "entropy")
)


@dataclass(frozen=True)
class Needs:
    """What at least one row of a batch asks for; the rest needn't be computed. No row's result depends on it.

    The rows' own tensors hold the same, but reading them would make the host wait for the device.

    :param noise: a temperature above 0
    :param filters: top_k or top_p
    :param remaskings: indices into :data:`~sinkprune_plugin.sampling.options.REMASKINGS`
    """

    noise: bool = True
    filters: bool = True
    remaskings: Collection[int] = (LOW_CONFIDENCE, RANDOM, MARGIN, ENTROPY)


EVERYTHING = Needs()


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
    needs: Needs = EVERYTHING,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Propose a token for each row.

    The mask token itself is excluded. The published sampler may propose it, and then leaves a mask in its output or
    fills it in a later block; where the model doesn't predict the mask token, the two are equal.

    :param logits: (R, V) floating point, not changed
    :param temperature: (R,) float64; 0 is greedy
    :param top_k: (R,) int64; 0 keeps all
    :param top_p: (R,) float64; 1 keeps all
    :param remasking: (R,) int64, index into :data:`~sinkprune_plugin.sampling.options.REMASKINGS`
    :param seed: (R,) int64
    :param step: (R,) int64, number of the noise's step
    :param position: (R,) int64, absolute position in prompt and canvas
    :param mask_token_id: the mask token
    :param needs: what the rows ask for; the rest is skipped
    :return: (R,) int64 tokens and (R,) float64 confidence, higher is more confident: the token's probability
        (low_confidence), a random number, the difference of the two highest probabilities (margin) or the negative
        entropy (entropy), all of the softmax without noise, temperature or filter
    """
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    confidence = torch.empty(rows, dtype=torch.float64, device=logits.device)
    chunk = max(1, CHUNK // vocabulary)
    for begin in range(0, rows, chunk):
        part = slice(begin, begin + chunk)
        # float32 holds bfloat16 and float16 exactly.
        own = logits[part].to(torch.float32, copy=True)
        own[:, mask_token_id] = -torch.inf
        allowed = _filtered(own, top_k[part], top_p[part]) if needs.filters else own
        where = (seed[part], step[part], position[part])
        tokens[part] = gumbel_argmax(allowed, temperature[part], *where) if needs.noise else allowed.argmax(dim=-1)
        confidence[part] = _confidence(own, tokens[part], remasking[part], where, needs.remaskings)
    return tokens, confidence


def _confidence(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    remasking: torch.Tensor,
    where: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    remaskings: Collection[int],
) -> torch.Tensor:
    # As in the published sampler: in float32, probabilities near 1 would often be equal.
    probabilities = torch.softmax(logits.double(), dim=-1)
    confidence = probabilities.gather(1, tokens[:, None])[:, 0]
    if RANDOM in remaskings:
        seed, step, position = where
        # No token has a negative position, so this noise differs from the noise that tokens are drawn with.
        confidence = torch.where(remasking == RANDOM, uniform_noise(seed, step, ~position, 1)[:, 0], confidence)
    if MARGIN in remaskings:
        first, second = probabilities.topk(2, dim=-1).values.unbind(1)
        confidence = torch.where(remasking == MARGIN, first - second, confidence)
    if ENTROPY in remaskings:
        entropy = torch.special.entr(probabilities).sum(dim=-1)
        confidence = torch.where(remasking == ENTROPY, -entropy, confidence)
    return confidence


def _filtered(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Exclude what :func:`filter_cuts` cuts off."""
    value, index = filter_cuts(logits, top_k, top_p)
    ids = torch.arange(logits.shape[1], device=logits.device)
    cut = (logits < value[:, None]) | ((logits == value[:, None]) & (ids > index[:, None]))
    return logits.masked_fill(cut, -torch.inf)


def filter_cuts(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the filters cut a row off: at tokens that aren't among the top_k most likely, or not in the smallest set
    with probability top_p.

    Both use the softmax of all tokens without temperature; of equally likely tokens the first are preferred.

    :param logits: (R, V) float32; -inf excludes a token
    :param top_k: (R,) int64; 0 keeps all
    :param top_p: (R,) float64; 1 keeps all
    :return: (R,) float32 smallest logit that is kept, and (R,) int64 the last index that is kept with this very logit
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)
    kept = (top_k[:, None] == 0) | (rank < top_k[:, None])
    probabilities = torch.softmax(ordered.double(), dim=-1)
    # A token stays if those before it sum to less than top_p, so the most likely one always stays.
    kept &= (top_p[:, None] >= 1) | (probabilities.cumsum(dim=-1) - probabilities < top_p[:, None])
    last = kept.sum(dim=-1, keepdim=True).clamp_(min=1) - 1
    return ordered.gather(1, last)[:, 0], order.gather(1, last)[:, 0]
