"""What is checked of a sparse checkpoint before another tool's loader reads it."""

from collections.abc import Sequence
from pathlib import Path

from sinkprune_plugin.formats.files.digests import check_digest, check_digest_names
from sinkprune_plugin.formats.files.part_groups import PartGroups, group_parts
from sinkprune_plugin.formats.files.shard_reader import index_of, read_headers
from sinkprune_plugin.formats.files.stored_weights import open_weight
from sinkprune_plugin.formats.sparsity_config import SparsityConfig

__all__ = ["check_files"]


def check_files(files: Sequence[Path], sparsity: SparsityConfig | None, directory: Path | None = None) -> PartGroups:
    """Check what our own reader checks when it opens a checkpoint, and the files' digests.

    :param files: the weight files that the loader has found
    :param sparsity: what config.json says
    :param directory: the checkpoint's directory, None for that of the files
    :return: what the headers say
    :raises UsageError: naming file and tensor
    """
    groups = group_parts(read_headers(files, index_of(files, directory)), sparsity)
    if sparsity is not None:
        weights = [open_weight(name, sparsity.format, parts) for name, parts in groups.sparse.items()]
        check_digest_names(sparsity.digests, files)
        for file in files:
            check_digest(sparsity.digests, file, weights)
    return groups
