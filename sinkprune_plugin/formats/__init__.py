"""Sparse checkpoints in the layouts of compressed-tensors: written, read, converted. docs/format.md is normative."""

from sinkprune_plugin.formats.checkpoint import load_sparse_checkpoint, save_sparse_checkpoint
from sinkprune_plugin.formats.checkpoint_reader import CheckpointReader
from sinkprune_plugin.formats.checkpoint_writer import WrittenCheckpoint
from sinkprune_plugin.formats.codecs.format_names import CheckpointFormat
from sinkprune_plugin.formats.convert import convert_checkpoint
from sinkprune_plugin.formats.sparsity_config import SparsityConfig, read_sparsity_config

__all__ = [
    "CheckpointFormat",
    "CheckpointReader",
    "SparsityConfig",
    "WrittenCheckpoint",
    "convert_checkpoint",
    "load_sparse_checkpoint",
    "read_sparsity_config",
    "save_sparse_checkpoint",
]
