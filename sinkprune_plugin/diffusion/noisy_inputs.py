"""What a model is called with to predict the corrupted tokens of a window.

Where attention is bidirectional that is the corrupted window. A model that denoises block by block sees each noisy
block after the clean ones before it, and never a noisy one before it. Its input holds both versions of the window, so
that one forward pass has every block open in turn; see :func:`~sinkprune_plugin.models.block_attention.joint_mask`.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sinkprune_plugin.diffusion.families import DiffusionSpec
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.block_attention import context_length, context_mask, joint_mask

__all__ = ["NoisyInputs", "check_block_window", "clean_inputs", "context_tokens", "noisy_inputs", "predict_noisy"]


@dataclass(frozen=True)
class NoisyInputs:
    """Arguments of one forward pass; with C clean tokens before the noisy ones, C = 0 where all see all.

    :param arguments: of the model's forward, by name
    :param valid: (B, C + N) bool, False on padding; None: there is none
    :param context: C
    """

    arguments: Mapping[str, torch.Tensor]
    valid: torch.Tensor | None
    context: int


def noisy_inputs(
    noisy_ids: torch.Tensor,
    clean_ids: torch.Tensor,
    spec: DiffusionSpec,
    valid: torch.Tensor | None = None,
    *,
    begin: int = 0,
) -> NoisyInputs:
    """Arrange windows for a forward pass that predicts their corrupted tokens.

    :param noisy_ids: (B, T) int64, corrupted windows
    :param clean_ids: (B, T) int64, the same windows without noise
    :param spec: the model's diffusion spec
    :param valid: (B, T) bool, False on padding; None: there is none
    :param begin: first position that may be noisy. Blocks are counted from there, and it is where the noisy tokens
        begin that the input ends with; only for a model that denoises block by block
    :return: the arguments
    """
    if spec.block_length is None:
        arguments = {"input_ids": noisy_ids}
        return NoisyInputs(arguments if valid is None else arguments | {"attention_mask": valid.long()}, valid, 0)
    length = noisy_ids.shape[1]
    context = context_length(length, spec.block_length, begin)
    positions, mask = _joint(length, spec.block_length, spec.context, begin)
    if valid is not None:
        mask = joint_mask(length, spec.block_length, spec.context, begin=begin, valid=valid.cpu())[:, None]
        valid = valid[:, positions[0].to(valid.device)]
    arguments = {
        "input_ids": torch.cat([clean_ids[:, :context], noisy_ids[:, begin:]], dim=1),
        "attention_mask": mask,
        "position_ids": positions,
    }
    return NoisyInputs(arguments, valid, context)


def clean_inputs(clean_ids: torch.Tensor, spec: DiffusionSpec, valid: torch.Tensor | None = None) -> NoisyInputs:
    """Arrange windows for a forward pass without noise, as a prompt is read.

    :param clean_ids: (B, T) int64
    :param spec: the model's diffusion spec
    :param valid: (B, T) bool, False on padding; None: there is none
    :return: the arguments
    """
    if spec.block_length is None:
        return noisy_inputs(clean_ids, clean_ids, spec, valid)
    mask = context_mask(clean_ids.shape[1], spec.block_length, spec.context)[None]
    if valid is not None:
        mask = mask & valid.cpu()[:, None, :]
    return NoisyInputs({"input_ids": clean_ids, "attention_mask": mask[:, None]}, valid, clean_ids.shape[1])


def predict_noisy(model: Any, inputs: NoisyInputs, device: torch.device) -> torch.Tensor:
    """Logits of the noisy tokens.

    :param model: called with ``inputs.arguments``; of a model that denoises block by block also with
        ``logits_to_keep``, as in transformers
    :param inputs: the arguments, on any device
    :param device: of the model's input
    :return: (B, N, V)
    """
    arguments: dict[str, Any] = {name: value.to(device) for name, value in inputs.arguments.items()}
    count = arguments["input_ids"].shape[1] - inputs.context
    if inputs.context:
        arguments["logits_to_keep"] = count
    logits: torch.Tensor = model(**arguments).logits
    return logits


def context_tokens(length: int, spec: DiffusionSpec) -> int:
    """Clean tokens that a window's forward pass has besides its T noisy ones.

    :param length: T
    :param spec: the model's diffusion spec
    """
    return 0 if spec.block_length is None else context_length(length, spec.block_length)


def check_block_window(length: int, spec: DiffusionSpec) -> None:
    """Refuse windows that a model which denoises block by block can't be measured or calibrated on.

    :param length: tokens of a window
    :param spec: the model's diffusion spec
    :raises UsageError: if the window has less than two blocks, or its last block would be a part of one
    """
    block = spec.block_length
    if block is None:
        return
    if length < 2 * block:
        raise UsageError(
            f"a window of {length} tokens has less than two blocks of {block}, the block length of this {spec.name} "
            f"model, so none would have a context; use windows of at least {2 * block} (--seq-len)"
        )
    if length % block:
        raise UsageError(
            f"a window of {length} tokens isn't divisible by {block}, the block length of this {spec.name} model; use "
            f"{length // block * block} or {(length // block + 1) * block} (--seq-len)"
        )


@functools.lru_cache(maxsize=4)
def _joint(length: int, block_length: int, context: Any, begin: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (1, C + N) and mask (1, 1, C + N, C + N), the same tensors for all passes of one length."""
    clean = context_length(length, block_length, begin)
    positions = torch.cat([torch.arange(clean), torch.arange(begin, length)])[None]
    return positions, joint_mask(length, block_length, context, begin=begin)[:, None]
