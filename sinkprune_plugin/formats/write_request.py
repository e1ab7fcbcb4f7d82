"""What a caller wants written, and what can be refused before anything is read."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinkprune_plugin.errors import UsageError, short
from sinkprune_plugin.formats.codecs.format_names import AUTO, LAYOUTS, parse_format
from sinkprune_plugin.formats.sparsity_config import without_sparsity
from sinkprune_plugin.outputs import check_output

__all__ = ["LARGEST_SHARD", "WriteRequest"]

LARGEST_SHARD = 5_000_000_000
"""Bytes of a file unless the caller or the source says otherwise."""


@dataclass(frozen=True, kw_only=True)
class WriteRequest:
    """What to write, and where. Refuses on creation what can't be written.

    :param directory: directory to be written
    :param format: a format's name or ``auto``
    :param layout: ``sinkprune`` or ``legacy``
    :param targets: names of the weights to store sparse; None leaves it to names and zeros
    :param candidates: names to consider in that case, in addition to those of Linears in numbered blocks
    :param config: content of config.json
    :param source: directory whose other files are taken over, or None
    :param max_shard_bytes: bytes of a file
    :param overwrite: replace a directory that has something in it
    :param progress: show progress bars on a terminal
    :raises UsageError: with the remedy
    """

    directory: Path
    format: str
    layout: str
    targets: Collection[str] | None
    candidates: frozenset[str] = frozenset()
    config: Mapping[str, Any]
    source: Path | None
    max_shard_bytes: int
    overwrite: bool
    progress: bool

    def __post_init__(self) -> None:
        if self.format != AUTO:
            parse_format(self.format, "the requested format")
        if self.layout not in LAYOUTS:
            raise UsageError(f"layout is '{short(self.layout)}'; the layouts are {', '.join(LAYOUTS)}")
        if self.max_shard_bytes < 1:
            raise UsageError(f"max_shard_bytes is {self.max_shard_bytes}; it must be at least 1")
        if isinstance(self.targets, str):
            raise UsageError(f"targets is the text '{short(self.targets)}'; pass a list of names")
        check_output(self.directory, overwrite=self.overwrite)
        if self.source is not None and self.directory.resolve() in self.source.resolve().parents:
            raise UsageError(
                f"output {self.directory} holds the source {self.source}, which would be lost; choose another output"
            )

    @property
    def quantized(self) -> bool:
        """Whether the tensors are quantized, as config says."""
        return "quantization_config" in without_sparsity(self.config)
