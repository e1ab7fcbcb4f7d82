"""Writing a checkpoint: count, decide, lay out, then move one tensor at a time."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats.codecs import bitmask24, bits
from sinkprune_plugin.formats.codecs.format_names import CheckpointFormat
from sinkprune_plugin.formats.expert_sparsity import with_expert_sparsity
from sinkprune_plugin.formats.files.digests import file_digest
from sinkprune_plugin.formats.files.other_files import copy_other_files, find_other_files
from sinkprune_plugin.formats.files.part_checks import VALUE_DTYPES, check_weight
from sinkprune_plugin.formats.files.part_groups import ALL_PARTS
from sinkprune_plugin.formats.files.safetensors_header import TORCH_DTYPES, TensorSpec
from sinkprune_plugin.formats.files.shard_reader import CONFIG_NAME, INDEX_NAME
from sinkprune_plugin.formats.files.shard_writer import (
    ShardWriter,
    shard_names,
    split_into_shards,
    tensor_bytes,
    writing,
)
from sinkprune_plugin.formats.files.stored_weights import CODECS
from sinkprune_plugin.formats.files.tensor_source import TensorSource
from sinkprune_plugin.formats.selection import (
    Census,
    Selection,
    find_candidates,
    is_embedding,
    part_specs,
    select_targets,
)
from sinkprune_plugin.formats.sparsity_config import with_digests, with_sparsity, without_sparsity
from sinkprune_plugin.formats.write_request import WriteRequest
from sinkprune_plugin.outputs import check_output, new_directory

__all__ = ["WrittenCheckpoint", "write_checkpoint"]


@dataclass(frozen=True)
class WrittenCheckpoint:
    """What has been written.

    :param directory: where
    :param format: how
    :param targets: names of the weights stored sparse
    :param dense_bytes: size of all tensors when dense
    :param stored_bytes: size of all tensors as stored
    :param global_sparsity: share of zeros in the whole model, None if they weren't counted
    :param notes: one line for each thing the user may not expect
    """

    directory: Path
    format: CheckpointFormat
    targets: tuple[str, ...]
    dense_bytes: int
    stored_bytes: int
    global_sparsity: float | None
    notes: tuple[str, ...]


def write_checkpoint(
    tensors: TensorSource, request: WriteRequest, *, shards: Mapping[str, int] | None = None
) -> WrittenCheckpoint:
    """Write a checkpoint, whole or not at all. At most one weight is in memory, dense and in parts.

    :param tensors: the dense tensors; those that can be sparse are read twice
    :param request: what to write
    :param shards: name → number of the file it goes into; None fills files up to ``max_shard_bytes``
    :return: what has been written
    :raises UsageError: if the request doesn't fit the tensors, or the disk is full
    """
    others = find_other_files(request.source)
    names = list(tensors)
    sparse_wanted = request.format != CheckpointFormat.DENSE
    specs = {name: tensors.spec(name) for name in names}
    candidates = find_candidates(specs, request.targets, request.candidates) if sparse_wanted else []
    census = _count(tensors, specs, candidates, request) if sparse_wanted else {}
    selection = select_targets(
        request.format,
        {name: specs[name] for name in candidates},
        census,
        named=request.targets,
        quantized=request.quantized,
    )
    stored = {name: _stored_specs(name, specs[name], selection, census) for name in names}
    _check_names(stored, selection)
    sizes = [sum(spec.nbytes for spec in stored[name].values()) for name in names]
    if shards is None:
        shards = dict(zip(names, split_into_shards(sizes, request.max_shard_bytes), strict=True))
    sparsity = _global_sparsity(specs, census) if sparse_wanted else None
    config = _config(request, selection, specs, sparsity or 0.0)
    config = with_expert_sparsity(config, legacy=bool(selection.targets) and request.layout == "legacy")
    check_output(request.directory, overwrite=request.overwrite, needed_bytes=sum(sizes) + others.nbytes)
    with writing(request.directory), new_directory(request.directory, overwrite=request.overwrite) as directory:
        copy_other_files(others, directory)
        files = _write_shards(directory, tensors, stored, shards, selection, request)
        if selection.targets:
            config = with_digests(config, {file.name: file_digest(file) for file in files})
        if config:
            _write_json(directory / CONFIG_NAME, config)
    return WrittenCheckpoint(
        directory=request.directory,
        format=selection.format,
        targets=tuple(sorted(selection.targets)),
        dense_bytes=sum(spec.nbytes for spec in specs.values()),
        stored_bytes=sum(sizes),
        global_sparsity=sparsity,
        notes=selection.notes + _note_on_stacks(specs, census) + others.notes,
    )


def _note_on_stacks(specs: Mapping[str, TensorSpec], census: Mapping[str, Census]) -> tuple[str, ...]:
    """What to say of pruned weights that are several matrices in one tensor, as fused experts are."""
    # Half of the elements, with room for a few that a solver left: the least that any pattern here is used for.
    stacks = sorted(
        name
        for name, counted in census.items()
        if len(specs[name].shape) == 3 and counted.nonzeros <= 0.51 * specs[name].elements
    )
    if not stacks:
        return ()
    more = f" and {len(stacks) - 1} more" if len(stacks) > 1 else ""
    return (
        f"{stacks[0]}{more}: pruned, but stacks of matrices, which stay dense; load the model with transformers and "
        "save it to have a tensor for each expert",
    )


def _count(
    tensors: TensorSource, specs: Mapping[str, TensorSpec], candidates: list[str], request: WriteRequest
) -> dict[str, Census]:
    census = {}
    wanted = set(candidates)
    with _progress(tensors, specs, "counting zeros", request) as bar:
        for name, spec in specs.items():
            if not spec.elements:
                # There may be any number of rows without columns; nothing is counted for each.
                census[name] = Census(0, 0 if name in wanted and spec.shape[1] % 4 == 0 else None)
            elif name in wanted:
                packed = bits.nonzero_bits(check_weight(tensors[name], name).cpu())
                excess = bitmask24.excess_groups(packed) if spec.shape[1] % 4 == 0 else None
                census[name] = Census(int(bits.bit_counts(packed).sum()), excess)
            elif (dtype := TORCH_DTYPES.get(spec.dtype)) in VALUE_DTYPES:
                pieces = (torch.frombuffer(piece, dtype=dtype) for piece in tensors.chunks(name) if len(piece))
                census[name] = Census(sum(bits.count_nonzeros(piece) for piece in pieces))
            bar.update(spec.nbytes)
    return census


def _global_sparsity(specs: Mapping[str, TensorSpec], census: Mapping[str, Census]) -> float:
    elements = sum(specs[name].elements for name in census)
    nonzeros = sum(counted.nonzeros for counted in census.values())
    return round(1 - nonzeros / elements, 4) if elements else 0.0


def _stored_specs(
    name: str, spec: TensorSpec, selection: Selection, census: Mapping[str, Census]
) -> dict[str, TensorSpec]:
    if name not in selection.targets:
        return {name: spec}
    module = name.removesuffix(".weight")
    parts = part_specs(spec, selection.format, census[name].nonzeros)
    return {f"{module}.{part}": part_spec for part, part_spec in parts.items()}


def _check_names(stored: Mapping[str, Mapping[str, TensorSpec]], selection: Selection) -> None:
    if not selection.targets:
        return
    for name in stored:
        if name not in selection.targets and name.rpartition(".")[2] in ALL_PARTS:
            raise UsageError(f"{name} would read as part of a weight in {selection.format}; rename it or use dense")


def _config(
    request: WriteRequest, selection: Selection, specs: Mapping[str, TensorSpec], sparsity: float
) -> dict[str, Any]:
    if not selection.targets:
        return without_sparsity(request.config)
    # Exact names, not the class Linear: readers that match by them then never look for parts of the vocabulary
    # projection or of any other module that stays dense, whatever it is called.
    linears = [name for name, spec in specs.items() if name.endswith(".weight") and len(spec.shape) == 2]
    return with_sparsity(
        request.config,
        selection.format,
        targets=sorted(name.removesuffix(".weight") for name in selection.targets),
        ignore=sorted(
            name.removesuffix(".weight") for name in linears if name not in selection.targets and not is_embedding(name)
        ),
        global_sparsity=sparsity,
        layout=request.layout,
    )


def _write_shards(
    directory: Path,
    tensors: TensorSource,
    stored: Mapping[str, Mapping[str, TensorSpec]],
    shards: Mapping[str, int],
    selection: Selection,
    request: WriteRequest,
) -> list[Path]:
    # Numbers whose file got nothing are skipped.
    numbers = sorted(set(shards.values())) or [0]
    files = dict(zip(numbers, shard_names(len(numbers)), strict=True))
    weight_map: dict[str, str] = {}
    with _progress(tensors, stored, "writing", request) as bar:
        for number, file in files.items():
            names = [name for name in stored if shards[name] == number]
            specs = {part: spec for name in names for part, spec in stored[name].items()}
            weight_map |= dict.fromkeys(specs, file)
            with ShardWriter(directory / file, specs) as shard:
                for name in names:
                    if name in selection.targets:
                        parts = CODECS[selection.format].compress(tensors[name], name=name)
                        for part, tensor in parts.items():
                            shard.write(f"{name.removesuffix('.weight')}.{part}", [tensor_bytes(tensor)])
                    else:
                        shard.write(name, tensors.chunks(name))
                    bar.update(tensors.spec(name).nbytes)
    if len(files) > 1:
        total = sum(spec.nbytes for specs in stored.values() for spec in specs.values())
        _write_json(directory / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return [directory / file for file in files.values()]


def _progress(tensors: TensorSource, names: Iterable[str], what: str, request: WriteRequest) -> "tqdm[Any]":
    total = sum(tensors.spec(name).nbytes for name in names)
    # None: only on a terminal.
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None if request.progress else True)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    with writing(file):
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
