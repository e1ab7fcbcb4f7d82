"""From a stream of a checkpoint's tensors, with sparse weights in parts, to a stream of dense weights.

Works on names and tensors as vLLM's loaders yield them, before a model's own loading. So fused projections and
tensor-parallel slices are cut from each weight just as from a dense checkpoint, and no more than one weight at a time
is both sparse and dense. Experts that a checkpoint has fused are taken apart here as well.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats.codecs.format_names import CheckpointFormat
from sinkprune_plugin.formats.files.file_checks import check_files
from sinkprune_plugin.formats.files.part_checks import DAMAGED
from sinkprune_plugin.formats.files.part_groups import dense_name, has_full_names, split_part
from sinkprune_plugin.formats.files.stored_weights import CODECS
from sinkprune_plugin.formats.sparsity_config import SparsityConfig, read_sparsity_config
from sinkprune_plugin.models.catalogue import native_model
from sinkprune_plugin.models.fused_experts import with_experts_apart

__all__ = ["complete_weights", "dense_weights", "install_sparse_loading", "read_block", "sparsity_of"]

Stream = Iterable[tuple[str, torch.Tensor]]


def dense_weights(stream: Stream, sparse_format: CheckpointFormat) -> Iterator[tuple[str, torch.Tensor]]:
    """Rebuild sparse weights; each is yielded as soon as the last of its parts has arrived, all else passes through.

    :param stream: name in the checkpoint → tensor; parts in any order, and between them anything
    :param sparse_format: the format that config.json names
    :return: name of the dense tensor → tensor
    :raises UsageError: naming the tensor, if a part is missing or left over, comes twice or contradicts another one
    """
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    seen: set[str] = set()
    for name, tensor in stream:
        owner, part = split_part(name)
        if not owner:
            _take(name, seen)
            yield name, tensor
            continue
        if sparse_format is CheckpointFormat.DENSE:
            # A sparse checkpoint must not pass for a dense one with unusual names; a tensor named "shape" may be one.
            _refuse_part(name, part)
            yield name, tensor
            continue
        if part not in sparse_format.parts:
            raise UsageError(f"{name} isn't a part of {sparse_format}: config.json names the wrong format, correct it")
        parts = waiting.setdefault(owner, {})
        if part in parts:
            raise UsageError(f"{name} is stored twice; write the checkpoint again")
        parts[part] = tensor
        if len(parts) < len(sparse_format.parts):
            continue
        del waiting[owner]
        dense = _dense_name(owner)
        _take(dense, seen)
        yield dense, CODECS[sparse_format].decompress(parts, name=dense)
        # Not kept until the next weight is complete.
        del parts
    for owner, parts in waiting.items():
        missing = next(part for part in sparse_format.parts if part not in parts)
        raise UsageError(
            f"{_dense_name(owner)}: {owner}.{missing}, which {sparse_format} needs, is in no file; {DAMAGED}"
        )


def _dense_name(owner: str) -> str:
    # A stream says too late whether one prefix is a full name; then the prefixes of biases are as well.
    return dense_name(owner, full_names=has_full_names(owner) or owner.endswith(".bias"))


def _take(name: str, seen: set[str]) -> None:
    if name in seen:
        raise UsageError(f"{name} is stored twice; write the checkpoint again")
    seen.add(name)


def _refuse_part(name: str, part: str) -> None:
    if part in ("compressed", "bitmask"):
        raise UsageError(
            f"{name} is part of a sparse weight, but config.json names the format dense; put its sparsity_config back"
        )


def complete_weights(stream: Stream, wanted: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass a stream on and check at its end that nothing was missing.

    vLLM on its own serves a model with a projection that was in no file, using whatever is in that memory.

    :param stream: name → tensor
    :param wanted: names that must appear
    :return: the same stream
    :raises UsageError: naming a tensor that didn't appear
    """
    missing = set(wanted)
    for name, tensor in stream:
        missing.discard(name)
        yield name, tensor
    if missing:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise UsageError(f"{min(missing)}{more} in no file of the checkpoint; {DAMAGED}")


def read_block(block: Mapping[str, Any]) -> SparsityConfig | None:
    """Read a ``quantization_config`` as vLLM hands it out.

    :param block: as in config.json, or with the empty method that vLLM gives the oldest checkpoints, which name none
    :return: what it says; None if the checkpoint isn't sparse
    :raises UsageError: if its content is invalid
    """
    said = {key: value for key, value in block.items() if key != "quant_method" or value}
    return read_sparsity_config({"quantization_config": said})


def sparsity_of(hf_config: Any) -> SparsityConfig | None:
    """What a checkpoint says about its sparsity.

    :param hf_config: the model's configuration as transformers gives it
    :return: that; None if nothing indicates sparse weights
    :raises UsageError: if the configuration is invalid
    """
    configs = (hf_config, getattr(hf_config, "text_config", None))
    for key in ("quantization_config", "compression_config"):
        for config in configs:
            block = getattr(config, key, None)
            if block:
                return read_block(block)
    return None


def install_sparse_loading() -> None:
    """Put the decompression into vLLM's loaders. Idempotent."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.runai_streamer_loader import RunaiModelStreamerLoader

    loaders: tuple[Any, ...] = (DefaultModelLoader, RunaiModelStreamerLoader)
    for loader in loaders:
        if not hasattr(loader.get_all_weights, "reads_sparse"):
            loader.get_all_weights = _reading_sparse(loader.get_all_weights)
            loader._prepare_weights = _checking_files(loader._prepare_weights)


def _reading_sparse(get_all_weights: Callable[..., Stream]) -> Callable[..., Stream]:
    def reading(self: Any, model_config: Any, model: Any) -> Stream:
        stream = get_all_weights(self, model_config, model)
        sparsity = sparsity_of(model_config.hf_config)
        if sparsity is not None:
            # The stream looks for its files once it is read from, those of the model first.
            self.sparsity_to_check = sparsity
            stream = dense_weights(stream, sparsity.format)
        # Only our models say what they need.
        names = getattr(model, "checkpoint_names", None)
        if names is None:
            return stream
        native = native_model(model_config.hf_config)
        if native is not None and native.experts is not None:
            stream = with_experts_apart(model_config.hf_config, native.experts, stream)
        return complete_weights(stream, names())

    reading.reads_sparse = True  # type: ignore[attr-defined]
    return reading


def _checking_files(prepare_weights: Callable[..., Any]) -> Callable[..., Any]:
    """Check the files as our own reader does, as soon as the loader has found or fetched them."""

    def checking(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = prepare_weights(self, *args, **kwargs)
        sparsity = self.__dict__.pop("sparsity_to_check", None)
        files = found if isinstance(found, list) else found[1]
        # Object storage is streamed, without headers to check beforehand; the stream is checked nevertheless.
        if sparsity is not None and not any("://" in file for file in files):
            check_files([Path(file) for file in files], sparsity)
        return found

    return checking
