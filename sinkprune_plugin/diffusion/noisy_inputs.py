"""What a model is called with to predict the corrupted tokens of a window.

Where attention is bidirectional that is the corrupted window. A model that denoises block by block sees each noisy
block after the clean ones before it, and never a noisy one before it. Its input holds both versions of the window, so
that one forward pass has every block open in turn; see :func:`~sinkprune_plugin.models.block_attention.joint_mask`.
"""

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sinkprune_plugin.diffusion.families import DiffusionSpec
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.block_attention import context_length, context_mask, joint_mask

__all__ = [
    "NoisyInputs",
    "arranged",
    "check_block_window",
    "check_blocks",
    "clean_inputs",
    "context_tokens",
    "first_noisy",
    "keeps_logits",
    "noisy_inputs",
    "predict_noisy",
]


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
    spec: DiffusionSpec | None,
    valid: torch.Tensor | None = None,
    *,
    begin: int = 0,
) -> NoisyInputs:
    """Arrange windows for a forward pass that predicts their corrupted tokens.

    :param noisy_ids: (B, T) int64, corrupted windows
    :param clean_ids: (B, T) int64, the same windows without noise
    :param spec: the model's diffusion spec; None: all tokens see all
    :param valid: (B, T) bool, False on padding; None: there is none
    :param begin: first position that may be noisy, of a model that denoises block by block. The noisy tokens with which
        the input ends begin at :func:`first_noisy` of it
    :return: the arguments
    """
    if spec is None or spec.block_length is None:
        # No mask where there is no padding: attention without a mask is the faster kernel.
        arguments = {"input_ids": noisy_ids}
        return NoisyInputs(arguments if valid is None else arguments | {"attention_mask": valid.long()}, valid, 0)
    length, begin = noisy_ids.shape[1], first_noisy(begin, spec)
    context = context_length(length, spec.block_length, begin)
    rows = torch.cat([clean_ids[:, :context], noisy_ids[:, begin:]], dim=1)
    inputs = arranged(rows, spec, length, begin)
    if valid is None:
        return inputs
    mask = joint_mask(length, spec.block_length, spec.context, begin=begin, valid=valid.cpu())[:, None]
    valid = valid[:, inputs.arguments["position_ids"][0].to(valid.device)]
    return NoisyInputs({**inputs.arguments, "attention_mask": mask}, valid, context)


def arranged(rows: torch.Tensor, spec: DiffusionSpec, length: int, begin: int) -> NoisyInputs:
    """The inputs that :func:`noisy_inputs` makes, from token ids in their order.

    :param rows: (B, C + N) int64, clean tokens and then noisy ones; without blocks C = 0
    :param spec: the model's diffusion spec
    :param length: T, tokens of the clean window
    :param begin: first position that may be noisy
    :return: the arguments
    """
    if spec.block_length is None:
        return NoisyInputs({"input_ids": rows}, None, 0)
    begin = first_noisy(begin, spec)
    positions, mask = _joint(length, spec.block_length, spec.context, begin)
    arguments = {"input_ids": rows, "attention_mask": mask, "position_ids": positions}
    return NoisyInputs(arguments, None, context_length(length, spec.block_length, begin))


def first_noisy(begin: int, spec: DiffusionSpec) -> int:
    """Where the noisy tokens of an input begin.

    :param begin: first position that may be noisy
    :param spec: the model's diffusion spec
    :return: the same where blocks are counted from there; where they lie on a grid over the whole sequence
        (``block_causal``), the beginning of its block, whose first tokens are open with the others
    """
    if spec.block_length is None or spec.context != "block_causal":
        return begin
    return begin // spec.block_length * spec.block_length


def clean_inputs(clean_ids: torch.Tensor, spec: DiffusionSpec | None, valid: torch.Tensor | None = None) -> NoisyInputs:
    """Arrange windows for a forward pass without noise, as a prompt is read.

    :param clean_ids: (B, T) int64
    :param spec: the model's diffusion spec; None: all tokens see all
    :param valid: (B, T) bool, False on padding; None: there is none
    :return: the arguments
    """
    if spec is None or spec.block_length is None:
        return noisy_inputs(clean_ids, clean_ids, spec, valid)
    mask = context_mask(clean_ids.shape[1], spec.block_length, spec.context)[None]
    if valid is not None:
        mask = mask & valid.cpu()[:, None, :]
    return NoisyInputs({"input_ids": clean_ids, "attention_mask": mask[:, None]}, valid, clean_ids.shape[1])


def predict_noisy(model: Any, inputs: NoisyInputs, device: torch.device) -> torch.Tensor:
    """Logits of the noisy tokens.

    :param model: called with ``inputs.arguments``, and where there is context and it takes it with ``logits_to_keep``
    :param inputs: the arguments, on any device
    :param device: of the model's input
    :return: (B, N, V)
    """
    arguments: dict[str, Any] = {name: value.to(device) for name, value in inputs.arguments.items()}
    count = arguments["input_ids"].shape[1] - inputs.context
    if inputs.context and keeps_logits(model):
        arguments["logits_to_keep"] = count
    logits: torch.Tensor = model(**arguments).logits
    return logits[:, -count:]


def keeps_logits(model: Any) -> bool:
    """Whether a model computes the logits of some positions only, if asked to as in transformers.

    :param model: transformers model
    """
    return "logits_to_keep" in inspect.signature(model.forward).parameters


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
    check_blocks(length, spec.block_length)


def check_blocks(length: int, block: int | None) -> None:
    """The same as :func:`check_block_window`, for a block length.

    :param length: tokens of a window
    :param block: tokens in a block; None: there are none
    :raises UsageError: as there
    """
    if block is None:
        return
    if length < 2 * block:
        raise UsageError(
            f"a window of {length} tokens has less than two blocks of {block}, the model's block length, so none would "
            f"have a context; use windows of at least {2 * block} (--seq-len)"
        )
    if length % block:
        raise UsageError(
            f"a window of {length} tokens isn't divisible by {block}, the model's block length; use "
            f"{length // block * block} or {(length // block + 1) * block} (--seq-len)"
        )


@functools.lru_cache(maxsize=4)
def _joint(length: int, block_length: int, context: Any, begin: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (1, C + N) and mask (1, 1, C + N, C + N), the same tensors for all passes of one length."""
    clean = context_length(length, block_length, begin)
    positions = torch.cat([torch.arange(clean), torch.arange(begin, length)])[None]
    return positions, joint_mask(length, block_length, context, begin=begin)[:, None]
