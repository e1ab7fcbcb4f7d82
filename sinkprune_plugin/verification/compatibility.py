"""Whether one checkpoint can have come from the other by pruning."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sinkprune_plugin.diffusion import DiffusionSpec, resolve_diffusion
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import CheckpointReader, load_sparse_checkpoint
from sinkprune_plugin.formats.files.safetensors_header import TORCH_DTYPES
from sinkprune_plugin.inspection.info import LayerInfo
from sinkprune_plugin.loading import load_config, load_tokenizer
from sinkprune_plugin.models.catalogue import NATIVE_MODELS
from sinkprune_plugin.models.sizes_in_config import KEPT_KEY

__all__ = ["check_derived", "check_pair", "check_tokenizers", "memory_bytes", "natural_zeros"]

# The first number in a name counts the decoder blocks.
_IN_A_BLOCK = re.compile(r"(?:.*?\.)??\d+\.")
# Lists of experts are within the blocks, and a number follows for the expert.
_EXPERT_LISTS = sorted({native.experts.experts for native in NATIVE_MODELS if native.experts is not None})
_IN_AN_EXPERT = re.compile(
    rf"(?P<list>(?:.*?\.)??(?P<block>\d+)\.(?:{'|'.join(map(re.escape, _EXPERT_LISTS))})\.)(?P<number>\d+)\."
)


def check_pair(dense: Path, pruned: Path, config: Any, tokenizer: Any) -> DiffusionSpec:
    """Check that two checkpoints can be compared or one trained toward the other: weights, tokens, family.

    :param dense: checkpoint directory
    :param pruned: checkpoint directory
    :param config: configuration of the first
    :param tokenizer: tokenizer of the first
    :return: the diffusion spec of both
    :raises UsageError: naming the first thing that differs
    """
    check_derived(dense, pruned)
    spec = resolve_diffusion(config, tokenizer)
    other = resolve_diffusion(load_config(pruned), tokenizer)
    check_tokenizers(tokenizer, load_tokenizer(pruned))
    if spec != other:
        raise UsageError(
            f"{dense} has mask token {spec.mask_token_id} of {spec.vocab_size} ({spec.name}) and {pruned} has "
            f"{other.mask_token_id} of {other.vocab_size} ({other.name}); compare a model with one pruned from it"
        )
    return spec


def check_derived(dense: Path, pruned: Path) -> None:
    """Check that one has the other's weights, except those of what pruning removes; quantized ones may have more.

    That is: decoder blocks, and experts of a block, at the end of their list (those that stay move up), and rows and
    columns within blocks.

    :param dense: checkpoint directory
    :param pruned: checkpoint directory
    :raises UsageError: naming the first weight that differs
    """
    first, second = load_sparse_checkpoint(dense), load_sparse_checkpoint(pruned)
    common = [name for name in first if name in second]
    if not any(name.endswith(".weight") for name in common):
        raise UsageError(f"{dense} and {pruned} have no layer in common; compare a model with one pruned from it")
    stay = {place for name in second for place in (_block(name), _expert(name)) if place is not None}
    lists = {match["list"] for name in second if (match := _IN_AN_EXPERT.match(name))}
    for name in first:
        if not name.endswith(".weight") or name in second:
            continue
        whole_block = _block(name) is not None and _block(name) not in stay
        match = _IN_AN_EXPERT.match(name)
        # A list of experts stays, however short.
        whole_expert = match is not None and match[0] not in stay and match["list"] in lists
        if not (whole_block or whole_expert):
            raise UsageError(f"{pruned} has no {name}, which {dense} has; it isn't derived from that model")
    for name in common:
        a, b = first.spec(name).shape, second.spec(name).shape
        # Of a unit's Linears some lose rows and the others columns, and none loses both.
        lost = [before - after for before, after in zip(a, b, strict=False)]
        smaller = len(a) == len(b) and min(lost, default=0) >= 0 and sum(map(bool, lost)) <= 1
        if a != b and not (smaller and _block(name) is not None):
            raise UsageError(f"{name} is {list(a)} in {dense} and {list(b)} in {pruned}; they aren't one model")


def _block(name: str) -> str | None:
    match = _IN_A_BLOCK.match(name)
    return None if match is None else match[0]


def _expert(name: str) -> str | None:
    match = _IN_AN_EXPERT.match(name)
    return None if match is None else match[0]


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


def natural_zeros(dense: Path, pruned: Path, layers: Mapping[str, LayerInfo]) -> dict[str, int]:
    """Zeros that pruning didn't create: those where the dense model has a zero too, by module type.

    None is counted where positions don't correspond: in a weight that has lost rows or columns, and in any weight if
    blocks were removed. Experts that have moved up are found by the numbers that their removal noted.

    :param dense: checkpoint directory
    :param pruned: checkpoint directory
    :param layers: module name → its weight, as :func:`~sinkprune_plugin.inspection.info.inspect_checkpoint` found them
    :return: module type → number of zeros, for the weights that modifiers prune by default
    """
    first, second = load_sparse_checkpoint(dense), load_sparse_checkpoint(pruned)
    counts: Counter[str] = Counter()
    if {_block(name) for name in first} != {_block(name) for name in second}:
        return {}
    numbers = [reader.config.get(KEPT_KEY) for reader in (first, second)]
    for module, layer in layers.items():
        name = f"{module}.weight"
        before = _name_before(name, *numbers)
        if (
            layer.role == "linear"
            and before is not None
            and before in first
            and first.spec(before).shape == second.spec(name).shape
        ):
            counts[layer.type] += int((_is_zero(first, before) & _is_zero(second, name)).sum())
    return dict(counts)


def _name_before(name: str, dense: Any, pruned: Any) -> str | None:
    """Name of the same weight in the dense model.

    :param name: in the pruned model
    :param dense: the dense model's ``sinkprune_kept_experts``, numbers that its experts once had; None: it has none
    :param pruned: the same of the pruned model
    :return: the name; None where these lists don't say it
    """
    match = _IN_AN_EXPERT.match(name)
    if match is None or pruned is None:
        return name
    block, place = int(match["block"]), int(match["number"])
    try:
        number = pruned[block][place]
        before = number if dense is None else dense[block].index(number)
    except (IndexError, KeyError, TypeError, ValueError):
        # Nothing that loads a checkpoint reads them, so nothing has checked them.
        return None
    return f"{match['list']}{before}.{name[match.end() :]}"


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
