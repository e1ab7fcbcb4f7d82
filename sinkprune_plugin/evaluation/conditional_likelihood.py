"""Log-likelihood of an answer given its context, as LLaDA's evaluation estimates it.

"Large Language Diffusion Models" (arXiv 2502.09992), section 2.4 and appendix B.5, equation 6: of the answer's L tokens
a number l, uniform in 1 … L, is masked at random, and

    log p(answer | context) ≥ E_l E_masked [ (L / l) Σ_masked log p(token | context and the other tokens) ].

The context is never masked. l is stratified over the samples: like the published program, but from a random start that
isn't a whole number, since rounding halves would make even l likelier than odd ones.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from sinkprune_plugin.diffusion import DiffusionSpec, sample_generator
from sinkprune_plugin.errors import UsageError

__all__ = ["answer_log_likelihood", "masked_counts"]


def masked_counts(length: int, samples: int, generator: torch.Generator) -> torch.Tensor:
    """Numbers of masked tokens, spread evenly over 1 … length; each by itself is uniform.

    :param length: tokens of the answer
    :param samples: how many numbers
    :param generator: for the start
    :return: (samples,) int64
    """
    start = torch.rand((), generator=generator, dtype=torch.float64) * length
    places = (start + torch.arange(samples, dtype=torch.float64) * (length / samples)) % length
    # The remainder of a division may round up to the divisor.
    return places.long().clamp(max=length - 1) + 1


@torch.no_grad()
def answer_log_likelihood(
    model: Any,
    context: Sequence[int],
    answer: Sequence[int],
    spec: DiffusionSpec,
    *,
    mc_num: int = 128,
    batch_size: int = 32,
    cfg: float = 0.0,
    seed: int = 0,
) -> float:
    """Estimate log p(answer | context) in nats.

    The noise depends on the seed and the request's own tokens, not on the order of requests.

    :param model: transformers model
    :param context: token ids; may be empty where the family's logits aren't shifted
    :param answer: token ids, at least one
    :param spec: family and mask token
    :param mc_num: Monte-Carlo samples
    :param batch_size: samples in a forward pass
    :param cfg: scale of classifier-free guidance; 0 is off
    :param seed: of the noise
    :return: the estimate, at most 0
    :raises UsageError: if there is nothing to predict
    """
    if not answer:
        raise UsageError("the answer is empty; there is nothing to predict")
    if spec.logit_shift and not context:
        raise UsageError(f"a {spec.name} model predicts a token from the one before it; the context can't be empty")
    tokens = torch.tensor([*context, *answer], dtype=torch.int64)
    begin, length = len(context), len(answer)
    generator = sample_generator(seed, mc_num, tokens)
    counts = masked_counts(length, mc_num, generator)
    # The `count` smallest of random keys: every subset of that size is as likely.
    ranks = torch.rand(mc_num, length, generator=generator).argsort(dim=1).argsort(dim=1)
    masked = ranks < counts[:, None]
    noisy = tokens.repeat(mc_num, 1)
    noisy[:, begin:] = torch.where(masked, spec.mask_token_id, noisy[:, begin:])
    weights = length / counts.double()
    total = 0.0
    for rows in torch.arange(mc_num).split(batch_size):
        logits = _logits(model, noisy[rows], begin, spec, cfg)
        row, column = masked[rows].nonzero(as_tuple=True)
        # The logits that predict the answer are those of its positions, or of the positions before.
        picked = logits[row.to(logits.device), (begin + column - spec.logit_shift).to(logits.device)]
        losses = F.cross_entropy(picked.float(), tokens[begin + column].to(picked.device), reduction="none")
        total -= float((losses.double().cpu() * weights[rows][row]).sum())
    return total / mc_num


def _logits(model: Any, noisy: torch.Tensor, begin: int, spec: DiffusionSpec, cfg: float) -> torch.Tensor:
    device = model.device
    logits = model(input_ids=noisy.to(device)).logits
    if not cfg:
        return torch.as_tensor(logits)
    unconditional = noisy.clone()
    unconditional[:, :begin] = spec.mask_token_id
    without = model(input_ids=unconditional.to(device)).logits
    return torch.as_tensor(without + (cfg + 1) * (logits - without))
