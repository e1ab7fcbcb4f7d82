"""What two models write after the same prompts: how far they agree, and whether either repeats itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sinkprune_plugin.diffusion import DiffusionSpec
from sinkprune_plugin.sampling import denoise

__all__ = ["PairedSamples", "TextPair", "compare_samples", "distinct_n", "repetition"]

N_GRAM = 2
REPEATED = 4


@dataclass(frozen=True)
class TextPair:
    """One prompt and both answers, as text.

    :param prompt: the prompt
    :param dense: answer of the dense model
    :param pruned: answer of the pruned model
    """

    prompt: str
    dense: str
    pruned: str


@dataclass(frozen=True)
class PairedSamples:
    """Agreement of greedy answers.

    :param agreement: share of positions at which both wrote the same token
    :param along: the same among the tokens written up to each tenth of the steps: tokens that one of the models has
        written and the other hasn't count as different
    :param first_difference: mean number of tokens before the first difference
    :param distinct_dense: share of distinct pairs of tokens in the dense model's answers
    :param distinct_pruned: the same of the pruned model's
    :param repetition_dense: share of four-token runs that came before in the same answer
    :param repetition_pruned: the same of the pruned model's
    :param texts: prompts and answers
    """

    agreement: float
    along: tuple[float, ...]
    first_difference: float
    distinct_dense: float
    distinct_pruned: float
    repetition_dense: float
    repetition_pruned: float
    texts: tuple[TextPair, ...]


def compare_samples(
    dense: Any,
    pruned: Any,
    tokenizer: Any,
    prompts: torch.Tensor,
    spec: DiffusionSpec,
    *,
    gen_length: int = 64,
    block_length: int = 16,
    steps: int | None = None,
    progress: bool = False,
) -> PairedSamples:
    """Let both models answer the same prompts, greedily and with the published sampler.

    :param dense: transformers model
    :param pruned: another one with the same vocabulary
    :param tokenizer: for the texts
    :param prompts: (B, P) int64
    :param spec: family and mask token
    :param gen_length: tokens of each answer
    :param block_length: tokens in a block
    :param steps: denoising steps of an answer; default one for each token
    :param progress: show progress bars
    :return: agreement, repetition and texts
    :raises UsageError: on wrong options or logits that aren't finite
    """
    outputs = [
        denoise(
            model,
            prompts,
            gen_length=gen_length,
            block_length=block_length,
            steps=steps,
            spec=spec,
            progress=progress,
            return_trajectory=True,
        )
        for model in (dense, pruned)
    ]
    first, second = (torch.stack(output.sequences).cpu() for output in outputs)
    trajectories = [torch.stack(output.trajectory).cpu() for output in outputs]
    same = first == second
    # cumprod: 1 up to the first difference.
    before = same.long().cumprod(dim=1).sum(dim=1).double().mean().item()
    texts = tuple(
        TextPair(tokenizer.decode(prompt), tokenizer.decode(a), tokenizer.decode(b))
        for prompt, a, b in zip(prompts, first, second, strict=True)
    )
    return PairedSamples(
        agreement=same.double().mean().item(),
        along=_along(trajectories[0], trajectories[1], spec.mask_token_id),
        first_difference=before,
        distinct_dense=distinct_n(first.tolist(), N_GRAM),
        distinct_pruned=distinct_n(second.tolist(), N_GRAM),
        repetition_dense=repetition(first.tolist(), REPEATED),
        repetition_pruned=repetition(second.tolist(), REPEATED),
        texts=texts,
    )


def _along(dense: torch.Tensor, pruned: torch.Tensor, mask: int) -> tuple[float, ...]:
    """Agreement after each tenth of the steps.

    :param dense: (B, steps, G) canvases
    :param pruned: the same
    :param mask: the mask token
    """
    steps = dense.shape[1]
    shares = []
    for tenth in range(1, 11):
        step = max(0, round(steps * tenth / 10) - 1)
        written = (dense[:, step] != mask) | (pruned[:, step] != mask)
        same = (dense[:, step] == pruned[:, step]) & written
        shares.append(same.sum().item() / max(1, written.sum().item()))
    return tuple(shares)


def distinct_n(answers: Sequence[Sequence[int]], n: int) -> float:
    """Share of distinct n-grams among all n-grams of all answers (Li et al., arXiv 1510.03055, section 5.3).

    :param answers: token ids
    :param n: length of the n-grams
    :return: 0 to 1; 0 where there are none
    """
    grams = [tuple(answer[i : i + n]) for answer in answers for i in range(len(answer) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(answers: Sequence[Sequence[int]], n: int) -> float:
    """Share of n-grams that occurred before in the same answer.

    :param answers: token ids
    :param n: length of the n-grams
    :return: 0 to 1
    """
    repeated = total = 0
    for answer in answers:
        grams = [tuple(answer[i : i + n]) for i in range(len(answer) - n + 1)]
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / total if total else 0.0
