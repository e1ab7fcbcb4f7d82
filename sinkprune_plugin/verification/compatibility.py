"""Whether one checkpoint can have come from the other by pruning."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import CheckpointReader, load_sparse_checkpoint
from sinkprune_plugin.formats.safetensors_header import TORCH_DTYPES

__all__ = ["Sizes", "check_derived", "check_tokenizers", "memory_bytes", "natural_zeros"]


@dataclass(frozen=True)
class Sizes:
    """Sizes of one model in bytes.

    :param disk: its weight files
    :param memory: its parameters and buffers, loaded
    """

    disk: int
    memory: int


def check_derived(dense: Path, pruned: Path) -> None:
    """Check that both have the same weights by name and shape; quantized ones may have more beside them.

    :param dense: checkpoint directory
    :param pruned: checkpoint directory
    :raises UsageError: naming the first weight that differs
    """
    first, second = load_sparse_checkpoint(dense), load_sparse_checkpoint(pruned)
    common = [name for name in first if name in second]
    if not any(name.endswith(".weight") for name in common):
        raise UsageError(f"{dense} and {pruned} have no layer in common; compare a model with one pruned from it")
    missing = [name for name in first if name.endswith(".weight") and name not in second]
    if missing:
        raise UsageError(f"{pruned} has no {missing[0]}, which {dense} has; it isn't derived from that model")
    for name in common:
        a, b = first.spec(name).shape, second.spec(name).shape
        if a != b:
            raise UsageError(f"{name} is {list(a)} in {dense} and {list(b)} in {pruned}; they aren't one model")


def check_tokenizers(dense: Any, pruned: Any) -> None:
    """Check that both read and write the same tokens.

    :param dense: tokenizer
    :param pruned: tokenizer
    :raises UsageError: naming what differs
    """
    first, second = dense.get_vocab(), pruned.get_vocab()
    if len(first) != len(second):
        raise UsageError(
            f"the tokenizers have {len(first)} and {len(second)} tokens; verify compares models with one tokenizer"
        )
    for token, number in first.items():
        if second.get(token) != number:
            raise UsageError(
                f"token {token!r} is {number} in one tokenizer and {second.get(token)} in the other; verify compares "
                "models with one tokenizer"
            )


def natural_zeros(dense: Path, pruned: Path) -> dict[str, int]:
    """Zeros that pruning didn't make: those at which the dense model has a zero as well, by module type.

    :param dense: checkpoint directory
    :param pruned: checkpoint directory
    :return: last part of the module's name → number of zeros, for the weights of numbered blocks
    """
    first, second = load_sparse_checkpoint(dense), load_sparse_checkpoint(pruned)
    counts: Counter[str] = Counter()
    for name in first:
        if not name.endswith(".weight") or len(first.spec(name).shape) != 2 or name not in second:
            continue
        parts = name.split(".")
        if any(part.isdigit() for part in parts):
            counts[parts[-2]] += int((_is_zero(first, name) & _is_zero(second, name)).sum())
    return dict(counts)


def _is_zero(reader: CheckpointReader, name: str) -> torch.Tensor:
    tensor = reader[name]
    # Comparisons of float8 aren't implemented everywhere; its zeros are those of float32.
    return (tensor.float() if TORCH_DTYPES[reader.spec(name).dtype].itemsize == 1 else tensor) == 0


def memory_bytes(model: Any) -> int:
    """Bytes of a loaded model's parameters and buffers, shared ones counted once.

    :param model: transformers model
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
