"""Which weights of a checkpoint are stored sparse, and in which format."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sinkprune_plugin.errors import UsageError, short
from sinkprune_plugin.formats.codecs.format_names import AUTO, CheckpointFormat
from sinkprune_plugin.formats.files.part_checks import VALUE_DTYPES
from sinkprune_plugin.formats.files.safetensors_header import DTYPE_NAMES, TORCH_DTYPES, TensorSpec

__all__ = ["Census", "Selection", "find_candidates", "is_embedding", "part_specs", "select_targets"]

# From this share of zeros on, which is llm-compressor's, a weight counts as pruned; below it the zeros may be natural.
# Only quantized weights have many natural zeros, made by rounding.
_PRUNED_QUANTIZED = 0.49

_IN_A_BLOCK = re.compile(r"(^|\.)\d+\.")
_EMBEDDING = re.compile(r"embed|(^|\.)(wte|wpe)\.")


@dataclass(frozen=True)
class Census:
    """What was counted in a tensor.

    :param nonzeros: elements that aren't zero
    :param excess: groups of four columns with more than two of them; None if the width isn't a multiple of four
    """

    nonzeros: int
    excess: int | None = None


@dataclass(frozen=True)
class Selection:
    """What is stored in which format.

    :param format: the format
    :param targets: names of the weights stored in it; all others are stored as they are
    :param notes: one line for each thing the user may not expect
    """

    format: CheckpointFormat
    targets: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def find_candidates(
    specs: Mapping[str, TensorSpec], named: Collection[str] | None, others: Collection[str] = ()
) -> list[str]:
    """Find the weights that may be stored sparse: those named, or else the Linears in numbered blocks.

    Embeddings and the vocabulary projection, which a loader may tie or look up row by row, are never among the latter.

    :param specs: name → kind and size of each tensor
    :param named: full names of weights, or None
    :param others: further names to consider where none are named
    :return: their names
    :raises UsageError: for a name that can't be stored sparse
    """
    if named is None:
        linears = {name for name in specs if _IN_A_BLOCK.search(name) and not is_embedding(name)}
        return [name for name in specs if name in linears.union(others) and _can_be_sparse(name, specs[name])]
    for name in named:
        if name not in specs:
            raise UsageError(f"target {short(name)} is no tensor of this checkpoint; pass full names of weights")
        if not _can_be_sparse(name, specs[name]):
            spec, dtypes = specs[name], ", ".join(DTYPE_NAMES[dtype] for dtype in VALUE_DTYPES)
            raise UsageError(
                f"target {name} is {spec.dtype} of shape {list(spec.shape)}; only 2-D tensors named *.weight of "
                f"{dtypes} can be sparse: leave it out"
            )
    return [name for name in specs if name in set(named)]


def is_embedding(name: str) -> bool:
    """Whether a tensor, judged by its name, is a table of embeddings.

    :param name: its full name
    """
    return bool(_EMBEDDING.search(name))


def _can_be_sparse(name: str, spec: TensorSpec) -> bool:
    module = name.removesuffix(".weight")
    # The parts of a module that is itself called weight would read as those of the layout before 0.9.
    named = module not in ("", name) and not module.endswith(".weight")
    return named and len(spec.shape) == 2 and TORCH_DTYPES.get(spec.dtype) in VALUE_DTYPES


def part_specs(spec: TensorSpec, sparse_format: CheckpointFormat, nonzeros: int) -> dict[str, TensorSpec]:
    """Kind and size of the parts of a weight.

    :param spec: the dense weight, (R, C)
    :param sparse_format: a sparse format
    :param nonzeros: of the weight
    :return: local name → kind and size
    """
    rows, columns = spec.shape
    mask = TensorSpec("U8", (rows, -(-columns // 8)))
    if sparse_format is CheckpointFormat.SPARSE_24_BITMASK:
        values = TensorSpec(spec.dtype, (rows, columns // 2))
        return {"compressed": values, "bitmask": mask, "shape": TensorSpec("I64", (2, 1))}
    values = TensorSpec(spec.dtype, (nonzeros,))
    offsets = TensorSpec("I64", (rows,))
    return {"compressed": values, "bitmask": mask, "shape": TensorSpec("I64", (2,)), "row_offsets": offsets}


def select_targets(
    requested: str,
    specs: Mapping[str, TensorSpec],
    census: Mapping[str, Census],
    *,
    named: Collection[str] | None,
    quantized: bool,
) -> Selection:
    """Decide on the format and the weights stored in it.

    :param requested: a format's name or ``auto``
    :param specs: name → kind and size of each candidate, or of each weight named
    :param census: the same → what was counted in it
    :param named: weights the user named; all of them are stored in the format
    :param quantized: whether the checkpoint is quantized as well; then only what is 2:4 is stored sparse
    :raises UsageError: if what was asked for doesn't fit the weights
    """
    if requested == CheckpointFormat.DENSE:
        return Selection(CheckpointFormat.DENSE)
    pruned = sorted(named if named is not None else (name for name in specs if _is_pruned(specs[name], census[name])))
    not_24 = [name for name in pruned if census[name].excess != 0]
    if quantized and named is None and requested != CheckpointFormat.SPARSE_BITMASK:
        return _select_quantized(pruned, not_24)
    if requested == AUTO:
        if not pruned:
            return Selection(CheckpointFormat.DENSE, notes=("no weight has enough zeros; the checkpoint is dense",))
        if not not_24:
            return Selection(CheckpointFormat.SPARSE_24_BITMASK, frozenset(pruned))
        if sum(_saved_bytes(specs[name], census[name], CheckpointFormat.SPARSE_BITMASK) for name in pruned) > 0:
            return Selection(CheckpointFormat.SPARSE_BITMASK, frozenset(pruned))
        return Selection(CheckpointFormat.DENSE, notes=("sparse-bitmask would be larger; the checkpoint is dense",))
    if not pruned:
        raise UsageError(f"no weight has enough zeros to be stored as {requested}; prune the model first or use dense")
    if requested == CheckpointFormat.SPARSE_24_BITMASK and not_24:
        raise UsageError(_not_24(not_24, specs, census))
    return Selection(CheckpointFormat(requested), frozenset(pruned))


def _select_quantized(pruned: list[str], not_24: list[str]) -> Selection:
    targets = frozenset(pruned) - set(not_24)
    notes = []
    if not_24:
        others = f" and {len(not_24) - 1} more" if len(not_24) > 1 else ""
        notes.append(f"{not_24[0]}{others}: pruned and quantized but not 2:4, stored dense")
    elif not targets:
        notes.append("no weight under the quantization is pruned; the checkpoint has no sparse weights")
    chosen = CheckpointFormat.SPARSE_24_BITMASK if targets else CheckpointFormat.DENSE
    return Selection(chosen, targets, tuple(notes))


def _is_pruned(spec: TensorSpec, census: Census) -> bool:
    if _element_size(spec) == 1:
        return census.nonzeros <= (1 - _PRUNED_QUANTIZED) * spec.elements and spec.elements > 0
    fitting = [CheckpointFormat.SPARSE_BITMASK]
    if census.excess == 0:
        fitting.append(CheckpointFormat.SPARSE_24_BITMASK)
    return any(_saved_bytes(spec, census, sparse_format) > 0 for sparse_format in fitting)


def _saved_bytes(spec: TensorSpec, census: Census, sparse_format: CheckpointFormat) -> int:
    parts = part_specs(spec, sparse_format, census.nonzeros)
    return spec.nbytes - sum(part.nbytes for part in parts.values())


def _element_size(spec: TensorSpec) -> int:
    return TORCH_DTYPES[spec.dtype].itemsize


def _not_24(names: list[str], specs: Mapping[str, TensorSpec], census: Mapping[str, Census]) -> str:
    first = names[0]
    rows, columns = specs[first].shape
    excess = census[first].excess
    if excess is None:
        what = f"{first} has {columns} columns, which isn't a multiple of 4"
    else:
        what = f"{first} isn't 2:4: {excess} of its {rows * columns // 4} groups of 4 have more than 2 non-zeros"
    others = f", and {len(names) - 1} more weights don't fit either" if len(names) > 1 else ""
    return f"{what}{others}; use {CheckpointFormat.SPARSE_BITMASK} or prune with mask_structure 2:4"
