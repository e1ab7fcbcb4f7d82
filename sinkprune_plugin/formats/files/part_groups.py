"""Which tensors of a checkpoint's files make up which sparse weight, judged by names alone.

The only place for it: our own reader, transformers and vLLM use this result before they read a weight, so that all of
them accept and refuse the same checkpoints.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from sinkprune_plugin.errors import UsageError, short
from sinkprune_plugin.formats.codecs.format_names import CheckpointFormat
from sinkprune_plugin.formats.files.part_checks import DAMAGED
from sinkprune_plugin.formats.files.safetensors_header import TensorEntry
from sinkprune_plugin.formats.sparsity_config import SparsityConfig

__all__ = ["ALL_PARTS", "PartGroups", "dense_name", "group_parts", "has_full_names", "split_part"]

ALL_PARTS = frozenset(part for known in CheckpointFormat for part in known.parts)
"""Local names that no other tensor of a sparse checkpoint may have."""

# No tensor of a model is named like these two by accident; "shape" may be.
_TELLING = ("compressed", "bitmask")


@dataclass(frozen=True)
class PartGroups:
    """What the headers say.

    :param sparse: name of the dense tensor → local name → where that part is
    :param plain: name → where it is, of each tensor that is stored as it is
    :param full_names: whether the parts' prefix is the tensor's full name, as before compressed-tensors 0.9
    """

    sparse: Mapping[str, Mapping[str, TensorEntry]]
    plain: Mapping[str, TensorEntry]
    full_names: bool = False


def split_part(name: str) -> tuple[str, str]:
    """Split the name of a part.

    :param name: name of a tensor in a file
    :return: prefix and local name; two empty texts if it isn't named like a part
    """
    owner, _, part = name.rpartition(".")
    return (owner, part) if owner and part in ALL_PARTS else ("", "")


def has_full_names(owner: str) -> bool:
    """Whether a prefix is a weight's full name; compressed-tensors before 0.9 compressed every tensor and kept it.

    :param owner: prefix of some parts. One such prefix in a checkpoint means that all are full names
    """
    return owner.endswith(".weight")


def dense_name(owner: str, *, full_names: bool) -> str:
    """Name of the dense tensor that the parts under a prefix make up.

    :param owner: the prefix
    :param full_names: whether it is a full name
    """
    return owner if full_names else f"{owner}.weight"


def group_parts(headers: Mapping[str, TensorEntry], sparsity: SparsityConfig | None) -> PartGroups:
    """Group the tensors of a checkpoint.

    :param headers: name → where it is, over all files
    :param sparsity: what config.json says, None for a dense checkpoint
    :return: the weights stored in parts, by name; every other tensor is stored as it is
    :raises UsageError: if a part is missing or left over, a name is taken twice, or a weight that the configuration
        lists is in no file
    """
    sparse_format = CheckpointFormat.DENSE if sparsity is None else sparsity.format
    parts_of: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in headers.items():
        owner, part = split_part(name)
        if owner:
            parts_of.setdefault(owner, {})[part] = entry
    if sparse_format is CheckpointFormat.DENSE:
        _refuse_parts(parts_of)
        return PartGroups({}, headers)
    full_names = any(map(has_full_names, parts_of))
    sparse: dict[str, dict[str, TensorEntry]] = {}
    for owner, parts in sorted(parts_of.items()):
        name = dense_name(owner, full_names=full_names)
        _check_group(owner, name, parts, sparse_format)
        if name in headers:
            raise UsageError(
                f"{name} is stored twice, dense in {headers[name].file} and sparse in "
                f"{parts['compressed'].file}; write the checkpoint again"
            )
        sparse[name] = parts
    taken = {entry.name for parts in sparse.values() for entry in parts.values()}
    plain = {name: entry for name, entry in headers.items() if name not in taken}
    if sparsity is not None:
        _check_targets(sparsity, sparse.keys() | plain.keys())
    return PartGroups(sparse, plain, full_names)


def _check_group(owner: str, name: str, parts: Mapping[str, TensorEntry], sparse_format: CheckpointFormat) -> None:
    some = next(iter(parts.values()))
    for part in sparse_format.parts:
        if part not in parts:
            raise UsageError(
                f"{name}: {some.name} is in {some.file}, but {owner}.{part}, which {sparse_format} needs, is in no "
                f"file; {DAMAGED}"
            )
    extra = next((part for part in parts if part not in sparse_format.parts), None)
    if extra is not None:
        raise UsageError(
            f"{parts[extra].name} in {parts[extra].file} isn't a part of {sparse_format}: config.json names the "
            "wrong format, correct it"
        )


def _refuse_parts(parts_of: Mapping[str, Mapping[str, TensorEntry]]) -> None:
    """Refuse a sparse checkpoint that would pass for a dense one with unusual names."""
    for parts in parts_of.values():
        telling = next((parts[part] for part in _TELLING if part in parts), None)
        if telling is not None and len(parts) > 1:
            raise UsageError(
                f"{telling.name} in {telling.file} is part of a sparse weight, but config.json names no sparse format; "
                "put its sparsity_config back"
            )


def _check_targets(sparsity: SparsityConfig, names: set[str]) -> None:
    """Refuse missing weights: a loader would initialise a weight of which all parts are lost.

    Only names are compared. In files of other writers there are also classes and patterns among them, and the names
    may be those of the modules in memory, which differ from the files' where transformers renames while saving.
    """
    targets = sparsity.targets or ()
    if not sparsity.own:
        targets = tuple(target for target in targets if "." in target and not target.startswith("re:"))
    missing = [target for target in targets if f"{target}.weight" not in names]
    if missing and (sparsity.own or len(missing) < len(targets)):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UsageError(
            f"config.json lists {short(missing[0])}{more} among the sparse weights, but its parts are in no file; "
            f"{DAMAGED}"
        )
