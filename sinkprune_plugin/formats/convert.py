"""Converting a checkpoint from one format to another: the logic behind ``sinkprune convert``."""

from collections.abc import Collection
from pathlib import Path

from sinkprune_plugin.formats.checkpoint_reader import CheckpointReader
from sinkprune_plugin.formats.checkpoint_writer import WrittenCheckpoint, write_checkpoint
from sinkprune_plugin.formats.write_request import LARGEST_SHARD, WriteRequest

__all__ = ["convert_checkpoint"]


def convert_checkpoint(
    source: str | Path,
    target_dir: str | Path,
    to: str,
    *,
    layout: str = "sinkprune",
    targets: Collection[str] | None = None,
    progress: bool = True,
    overwrite: bool = False,
    max_shard_bytes: int | None = None,
) -> WrittenCheckpoint:
    """Write a checkpoint again in another format, one tensor at a time.

    :param source: checkpoint directory, dense or sparse
    :param target_dir: directory to be written; it appears whole or not at all
    :param to: ``dense``, ``sparse-bitmask``, ``sparse-24-bitmask`` or ``auto``
    :param layout: ``sinkprune``, or ``legacy`` for compressed-tensors up to 0.14 and vLLM up to 0.18
    :param targets: full names of the weights to store sparse; None decides as
        :func:`~sinkprune_plugin.formats.save_sparse_checkpoint` does
    :param progress: show progress bars on a terminal
    :param overwrite: replace a directory that has something in it
    :param max_shard_bytes: size of a file; None keeps each tensor in the file it is in
    :return: what has been written
    :raises UsageError: on wrong input, a damaged checkpoint or a full disk; nothing is left behind
    """
    reader = CheckpointReader(source)
    request = WriteRequest(
        directory=Path(target_dir),
        format=to,
        layout=layout,
        targets=targets,
        # Weights that are sparse already may stay so, whatever their names.
        candidates=reader.sparse_names,
        config=reader.config,
        source=reader.directory,
        max_shard_bytes=LARGEST_SHARD if max_shard_bytes is None else max_shard_bytes,
        overwrite=overwrite,
        progress=progress,
    )
    shards = {name: reader.shard(name) for name in reader} if max_shard_bytes is None else None
    return write_checkpoint(reader, request, shards=shards)
