"""Saving and loading whole checkpoints in a sparse format."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats.checkpoint_reader import CheckpointReader
from sinkprune_plugin.formats.checkpoint_writer import WrittenCheckpoint, write_checkpoint
from sinkprune_plugin.formats.codecs.format_names import AUTO
from sinkprune_plugin.formats.files.shard_reader import CONFIG_NAME, read_json
from sinkprune_plugin.formats.files.tensor_source import MemoryTensors, SpooledTensors, TensorSource
from sinkprune_plugin.formats.write_request import LARGEST_SHARD, WriteRequest
from sinkprune_plugin.outputs import scratch_directory

__all__ = ["load_sparse_checkpoint", "save_sparse_checkpoint"]


def load_sparse_checkpoint(directory: str | Path) -> CheckpointReader:
    """Open a checkpoint as a lazy mapping from names to dense tensors.

    Sparse checkpoints of this package and of compressed-tensors 0.4 to 0.14 are read, and dense ones.

    :param directory: checkpoint directory
    :return: the mapping; each access reads and, where need be, decompresses one tensor
    :raises UsageError: naming file and tensor, if the checkpoint is damaged; on access for damaged values
    """
    return CheckpointReader(directory)


def save_sparse_checkpoint(
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    directory: str | Path,
    *,
    format: str = AUTO,
    targets: Collection[str] | None = None,
    layout: str = "sinkprune",
    config: Mapping[str, Any] | None = None,
    source: str | Path | None = None,
    max_shard_bytes: int = LARGEST_SHARD,
    overwrite: bool = False,
    progress: bool = True,
) -> WrittenCheckpoint:
    """Save dense tensors as a checkpoint, sparse where that was asked for or is smaller.

    Tensors that share memory are written once for each name. An iterator is first stored on disk, next to the output.

    :param tensors: name → tensor, or (name, tensor) pairs
    :param directory: directory to be written; it appears whole or not at all
    :param format: ``dense``, ``sparse-bitmask``, ``sparse-24-bitmask``, or ``auto``: sparse-24-bitmask if all targets
        are 2:4, else sparse-bitmask if that is smaller, else dense
    :param targets: full names of the weights to store sparse; None takes the 2-D ``.weight`` tensors of numbered blocks
        that have enough zeros to become smaller, hence never the vocabulary projection or an embedding
    :param layout: ``sinkprune``, or ``legacy`` for compressed-tensors up to 0.14 and vLLM up to 0.18
    :param config: content of config.json; None takes the source's
    :param source: checkpoint directory whose other files (tokenizer, chat template, …) are taken over
    :param max_shard_bytes: size of a file, kept unless a single weight is larger
    :param overwrite: replace a directory that has something in it
    :param progress: show progress bars on a terminal
    :return: what has been written
    :raises UsageError: on wrong input or a full disk; nothing is left behind
    """
    other = None if source is None else Path(source)
    if other is not None and not other.is_dir():
        raise UsageError(f"source {other} isn't a directory; name the checkpoint to take the other files from")
    if config is None:
        config = read_json(other / CONFIG_NAME) if other is not None and (other / CONFIG_NAME).is_file() else {}
    request = WriteRequest(
        directory=Path(directory),
        format=format,
        layout=layout,
        targets=targets,
        config=config,
        source=other,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
        progress=progress,
    )
    if isinstance(tensors, CheckpointReader):
        return write_checkpoint(tensors, request)
    if isinstance(tensors, Mapping):
        return write_checkpoint(MemoryTensors(tensors), request)
    pairs: Iterable[tuple[str, torch.Tensor]] = tensors
    if isinstance(pairs, Collection):
        return write_checkpoint(_in_memory(pairs), request)
    with scratch_directory(request.directory) as folder:
        return write_checkpoint(SpooledTensors(pairs, folder), request)


def _in_memory(pairs: Iterable[tuple[str, torch.Tensor]]) -> TensorSource:
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in pairs:
        if name in tensors:
            raise UsageError(f"two tensors are named {name}; give each a name of its own")
        tensors[name] = tensor
    return MemoryTensors(tensors)
