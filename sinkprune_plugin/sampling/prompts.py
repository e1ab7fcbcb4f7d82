"""Prompts of the plain sampler: the forms they may have, and the checks of their content."""

from collections.abc import Sequence
from typing import Any

import torch

from sinkprune_plugin.diffusion import DiffusionSpec
from sinkprune_plugin.errors import UsageError

__all__ = ["as_prompts", "as_seeds", "check_prompts"]


def as_prompts(input_ids: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Split the input into prompts.

    :param input_ids: (P,), (B, P), or a sequence of (P,), all int64
    :return: one (P,) int64 tensor for each prompt
    :raises UsageError: if there is none, one is empty, or one isn't a row of int64
    """
    if isinstance(input_ids, torch.Tensor):
        prompts = list(input_ids) if input_ids.dim() > 1 else [input_ids]
    else:
        prompts = list(input_ids)
    if not prompts:
        raise UsageError("there is no prompt; give at least one")
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, torch.Tensor):
            raise UsageError(f"prompt {number} is a {type(prompt).__name__}; make it a tensor: torch.tensor(ids)")
        if prompt.dim() != 1 or prompt.dtype != torch.int64:
            raise UsageError(
                f"prompt {number} has shape {tuple(prompt.shape)} and dtype {prompt.dtype}; it must be one row of int64"
            )
        if len(prompt) == 0:
            raise UsageError(f"prompt {number} is empty; give it at least one token, such as the model's BOS token")
    return prompts


def check_prompts(prompts: Sequence[torch.Tensor], gen_length: int, spec: DiffusionSpec, config: Any) -> None:
    """Check prompts against a model.

    :param prompts: (P,) int64 each
    :param gen_length: tokens that are to be generated
    :param spec: the model's diffusion spec
    :param config: the model's configuration
    :raises UsageError: if a prompt holds the mask token or an id outside the vocabulary, or is too long
    """
    limit = getattr(config, "max_sequence_length", None) or getattr(config, "max_position_embeddings", None)
    for number, prompt in enumerate(prompts):
        length = len(prompt) + gen_length
        if limit is not None and length > limit:
            raise UsageError(
                f"prompt {number} of {len(prompt)} tokens and {gen_length} to generate take {length} positions, but "
                f"the model has {limit}; shorten the prompt or generate at most {max(limit - len(prompt), 0)}"
            )
        low, high = int(prompt.min()), int(prompt.max())
        if low < 0 or high >= spec.vocab_size:
            wrong = low if low < 0 else high
            raise UsageError(
                f"prompt {number} holds the token id {wrong}, outside the vocabulary of {spec.vocab_size}; use the "
                "model's own tokenizer"
            )
        masks = (prompt == spec.mask_token_id).nonzero()
        if len(masks):
            raise UsageError(
                f"prompt {number} holds the mask token {spec.mask_token_id} at position {int(masks[0])}; only what "
                "comes after a prompt is filled in, so take it out"
            )


def as_seeds(seed: int | Sequence[int], prompts: int) -> list[int]:
    """One seed for each prompt.

    :param seed: one for all, or one for each
    :param prompts: number of prompts
    :return: the seeds, not yet checked
    :raises UsageError: if their number is wrong
    """
    if not isinstance(seed, Sequence) or isinstance(seed, str):
        return [seed] * prompts
    if len(seed) != prompts:
        raise UsageError(f"there are {len(seed)} seeds for {prompts} prompts; give one for all, or one for each")
    return list(seed)
