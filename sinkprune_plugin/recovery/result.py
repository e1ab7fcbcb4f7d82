"""Writing a recovered model: the pruned checkpoint with other values in the same places."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import CheckpointReader
from sinkprune_plugin.formats.checkpoint_writer import write_checkpoint
from sinkprune_plugin.formats.files.safetensors_header import TORCH_DTYPES, TensorSpec
from sinkprune_plugin.formats.files.shard_reader import read_json
from sinkprune_plugin.formats.files.shard_writer import tensor_bytes
from sinkprune_plugin.formats.sparsity_config import without_sparsity
from sinkprune_plugin.formats.write_request import LARGEST_SHARD, WriteRequest
from sinkprune_plugin.provenance import PROVENANCE_FILE, write_provenance
from sinkprune_plugin.recovery.fixed_zeros import FixedZeros

__all__ = ["check_recoverable", "write_result"]


class _WithNewValues:
    """A checkpoint's tensors, some of them replaced; each in the dtype that it is stored in."""

    def __init__(self, reader: CheckpointReader, values: Mapping[str, torch.Tensor]) -> None:
        self._reader, self._values = reader, values

    def __iter__(self) -> Iterator[str]:
        return iter(self._reader)

    def spec(self, name: str) -> TensorSpec:
        return self._reader.spec(name)

    def chunks(self, name: str) -> Iterator[memoryview]:
        if name in self._values:
            yield tensor_bytes(self[name])
        else:
            yield from self._reader.chunks(name)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._values:
            return self._reader[name]
        return self._values[name].detach().to("cpu", TORCH_DTYPES[self.spec(name).dtype]).contiguous()


def check_recoverable(pruned: Path) -> CheckpointReader:
    """Refuse a checkpoint whose weights can't be trained and written again.

    :param pruned: checkpoint directory
    :return: its tensors
    :raises UsageError: if it is quantized
    """
    reader = CheckpointReader(pruned)
    if "quantization_config" in without_sparsity(reader.config):
        raise UsageError(f"{pruned} is quantized; recover the pruned model first and quantize the result")
    return reader


def write_result(
    reader: CheckpointReader,
    values: Mapping[str, torch.Tensor],
    zeros: FixedZeros,
    directory: Path,
    **settings: Any,
) -> None:
    """Write the checkpoint with new values in its own format, and check the zeros of what was written.

    :param reader: the pruned checkpoint
    :param values: name → trained weight
    :param zeros: what must be zero
    :param directory: empty directory to write into
    :param settings: what goes on record next to the pruned checkpoint's own record
    :raises UsageError: if the disk is full, or a zero was filled
    """
    request = WriteRequest(
        directory=directory,
        format=reader.format,
        layout="sinkprune",
        targets=reader.sparse_names or None,
        candidates=reader.sparse_names,
        config=reader.config,
        source=reader.directory,
        max_shard_bytes=LARGEST_SHARD,
        overwrite=False,
        progress=False,
    )
    write_checkpoint(_WithNewValues(reader, values), request, shards={name: reader.shard(name) for name in reader})
    zeros.require(CheckpointReader(directory), f"the recovered model in {directory.name}")
    earlier = reader.directory / PROVENANCE_FILE
    if earlier.is_file():
        try:
            settings["pruned_model_provenance"] = read_json(earlier)
        except UsageError:
            settings["pruned_model_provenance"] = "unreadable"
    write_provenance(directory, **settings)
