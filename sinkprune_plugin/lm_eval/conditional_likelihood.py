"""Log-likelihood of answers given their context, as LLaDA's evaluation estimates it.

"Large Language Diffusion Models" (arXiv 2502.09992), section 2.4 and appendix B.5, equation 6: of the answer's L tokens
a number l, uniform in 1 … L, is masked at random, and

    log p(answer | context) ≥ E_l E_masked [ (L / l) Σ_masked log p(token | context and the other tokens) ].

A model that denoises block by block writes an answer in blocks that are counted from its beginning, each given the
context and the clean blocks before it. The same samples estimate the sum of the blocks' bounds: averaged over l, a set
of masked tokens has the weight that it has with a noise level t per sample, uniform in (0, 1], and weights 1 / t, where
each block alone has its own bound.

The context is never masked. l is stratified over the samples: like the published program, but from a random start that
isn't a whole number, since rounding halves would make even l likelier than odd ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from sinkprune_plugin.devices import input_device
from sinkprune_plugin.diffusion import DiffusionSpec, NoisyInputs, noisy_inputs, predict_noisy, sample_generator
from sinkprune_plugin.diffusion.evaluation_mode import evaluation_mode
from sinkprune_plugin.diffusion.noisy_inputs import arranged, first_noisy
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.sampling.guidance import guided_logits

__all__ = ["answer_log_likelihoods", "masked_counts"]

# Masked positions whose logits are held in float32 at a time: 1024 × 126 464 floats are half a GB for LLaDA-8B.
_POSITIONS_AT_ONCE = 1024


def masked_counts(length: int, samples: int, generator: torch.Generator) -> torch.Tensor:
    """Numbers of masked tokens, spread evenly over 1 … length; each alone is uniform.

    :param length: tokens of the answer
    :param samples: how many numbers
    :param generator: for the start
    :return: (samples,) int64
    """
    start = torch.rand((), generator=generator, dtype=torch.float64) * length
    places = (start + torch.arange(samples, dtype=torch.float64) * (length / samples)) % length
    # The remainder of a division may round up to the divisor.
    return places.long().clamp(max=length - 1) + 1


def answer_log_likelihoods(
    model: Any,
    context: Sequence[int],
    answers: Sequence[Sequence[int]],
    spec: DiffusionSpec,
    *,
    mc_num: int = 128,
    batch_size: int = 32,
    cfg: float = 0.0,
    seed: int = 0,
    ending: Sequence[int] = (),
) -> list[float]:
    """Estimate log p(answer | context) in nats, for several answers to one context.

    The noise depends on the seed and the tokens of context and answer, not on the other answers or their order. Noisy
    rows that are the same go through the model once: of an answer of one token there is a single one, and options that
    are single letters share it.

    :param model: transformers model
    :param context: token ids; may be empty only where the family neither shifts its logits nor keeps the first token
    :param answers: token ids, at least one each, all of the same length
    :param spec: family and mask token
    :param mc_num: Monte-Carlo samples
    :param batch_size: noisy rows in a forward pass
    :param cfg: scale s of classifier-free guidance, logits u + (s + 1) (c - u), u those with a masked context; 0 is off
    :param seed: of the noise
    :param ending: token ids after the answer, seen by the model, never masked and not counted; at least one for a
        family that keeps a sequence's last token
    :return: the estimates, at most 0 each
    :raises UsageError: if there is nothing to predict or the model's logits aren't finite
    """
    lengths = {len(answer) for answer in answers}
    if len(lengths) != 1 or 0 in lengths:
        raise UsageError(f"the answers have {sorted(lengths)} tokens; give answers of equal length, at least 1")
    if (spec.logit_shift or spec.keep_first) and not context:
        raise UsageError(f"a {spec.name} model needs a token before the answer; the context can't be empty")
    if spec.keep_last and not ending:
        raise UsageError(f"a {spec.name} model keeps a sequence's last token; give an ending such as its EOS token")
    if cfg and spec.block_length is not None:
        raise UsageError(f"cfg {cfg:g} isn't supported for a {spec.name} model; leave it out")
    noisy = [_corrupt(context, answer, ending, spec, mc_num, seed) for answer in answers]
    owner = torch.arange(len(noisy)).repeat_interleave(torch.tensor([len(one.rows) for one in noisy]))
    masked, weights = torch.cat([one.masked for one in noisy]), torch.cat([one.weights for one in noisy])
    targets = torch.tensor([list(answer) for answer in answers], dtype=torch.int64)
    rows, place = torch.cat([one.rows for one in noisy]).unique(dim=0, return_inverse=True)
    length = len(context) + len(answers[0]) + len(ending)
    # Of a model with blocks, only the noisy tokens' logits are there.
    begin = len(context) if spec.block_length is None else len(context) - first_noisy(len(context), spec)
    totals = torch.zeros(len(noisy), dtype=torch.float64)
    with evaluation_mode(model):
        for first in range(0, len(rows), batch_size):
            inputs = arranged(rows[first : first + batch_size], spec, length, len(context))
            logits = _logits(model, inputs, len(context), spec.mask_token_id, cfg)
            used = ((place >= first) & (place < first + batch_size)).nonzero()[:, 0]
            which, column = masked[used].nonzero(as_tuple=True)
            source = used[which]
            # The logits that predict the answer are those of its positions, or of the positions before.
            losses = _losses(
                logits, place[source] - first, begin + column - spec.logit_shift, targets, owner[source], column
            )
            totals.index_add_(0, owner[source], -losses * weights[source])
    return totals.tolist()


@dataclass(frozen=True)
class _NoisyAnswer:
    """All different noisy versions of one answer.

    :param rows: (R, T) int64, context, noisy answer and ending
    :param masked: (R, L) bool
    :param weights: (R,) float64, weight of a masked token's loss: L / l for each sample that drew the row, over all
        samples
    """

    rows: torch.Tensor
    masked: torch.Tensor
    weights: torch.Tensor


def _corrupt(
    context: Sequence[int], answer: Sequence[int], ending: Sequence[int], spec: DiffusionSpec, mc_num: int, seed: int
) -> _NoisyAnswer:
    tokens = torch.tensor([*context, *answer, *ending], dtype=torch.int64)
    begin, length = len(context), len(answer)
    generator = sample_generator(seed, mc_num, tokens)
    counts = masked_counts(length, mc_num, generator)
    # The `count` smallest of random keys: every subset of that size is as likely.
    ranks = torch.rand(mc_num, length, generator=generator).argsort(dim=1).argsort(dim=1)
    masked, drawn = (ranks < counts[:, None]).unique(dim=0, return_counts=True)
    rows = tokens.repeat(len(masked), 1)
    rows[:, begin : begin + length].masked_fill_(masked, spec.mask_token_id)
    rows = noisy_inputs(rows, tokens.expand_as(rows), spec, begin=begin).arguments["input_ids"]
    return _NoisyAnswer(rows, masked, drawn.double() * length / masked.sum(dim=1).double() / mc_num)


def _logits(model: Any, inputs: NoisyInputs, begin: int, mask: int, cfg: float) -> torch.Tensor:
    device = input_device(model)
    logits = predict_noisy(model, inputs, device)
    if not cfg:
        return logits
    return guided_logits(model, inputs.arguments["input_ids"].to(device), logits, begin, mask, cfg)


def _losses(
    logits: torch.Tensor,
    row: torch.Tensor,
    position: torch.Tensor,
    targets: torch.Tensor,
    owner: torch.Tensor,
    column: torch.Tensor,
) -> torch.Tensor:
    """-log p of each masked token, (masked tokens,) float64 on CPU."""
    device = logits.device
    expected = targets[owner, column].to(device)
    parts = zip(
        row.to(device).split(_POSITIONS_AT_ONCE),
        position.to(device).split(_POSITIONS_AT_ONCE),
        expected.split(_POSITIONS_AT_ONCE),
        strict=True,
    )
    # In float32: a log-sum-exp over a large vocabulary loses digits in bfloat16.
    losses = torch.cat([F.cross_entropy(logits[r, p].float(), target, reduction="none") for r, p, target in parts])
    if not bool(losses.isfinite().all()):
        raise UsageError("the model's logits hold NaN or Inf; check the weights, or evaluate with dtype=float32")
    return losses.cpu().double()
