"""Classifier-free guidance as in LLaDA's published sampler."""

from typing import Any

import torch

__all__ = ["guided_logits"]


def guided_logits(
    model: Any, tokens: torch.Tensor, logits: torch.Tensor, prompt_length: int, mask_token_id: int, scale: float
) -> torch.Tensor:
    """Move logits away from what is predicted without the prompt: u + (scale + 1) (c - u).

    :param model: transformers model
    :param tokens: (B, T) int64 that the logits belong to, on the model's device
    :param logits: (B, T, V), c
    :param prompt_length: tokens at the beginning that are masked for u
    :param mask_token_id: the mask token
    :param scale: of the guidance, above 0
    :return: (B, T, V)
    """
    unprompted = tokens.clone()
    unprompted[:, :prompt_length] = mask_token_id
    without: torch.Tensor = model(input_ids=unprompted).logits
    return without + (scale + 1) * (logits - without)
