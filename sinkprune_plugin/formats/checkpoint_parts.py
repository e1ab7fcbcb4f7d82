"""Which tensors of a checkpoint's files belong to which sparse weight, judged by the safetensors headers alone.

Runs before a single weight is read, so that a checkpoint with a part missing is refused in one line instead of being
loaded with a freshly initialised weight.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats.format_names import CheckpointFormat

__all__ = ["CheckpointParts", "dense_name", "scan_parts"]

_MARKERS = ("compressed", "bitmask")


@dataclass(frozen=True)
class CheckpointParts:
    """What the headers say.

    :param owners: prefix of each sparse weight → name of the file with its values
    :param plain: name → safetensors dtype name of each tensor stored as it is
    """

    owners: dict[str, str] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)


def dense_name(owner: str) -> str:
    """Name of the dense tensor that the parts under a prefix make up.

    Files written by compressed-tensors before 0.9 keep the tensor's full name as the prefix, later ones drop
    ``.weight``.
    """
    return owner if owner.endswith((".weight", ".bias")) else f"{owner}.weight"


def scan_parts(files: Iterable[str | Path], sparse_format: CheckpointFormat) -> CheckpointParts:
    """Read the headers of all shards and check that each sparse weight is complete and claimed once.

    :param files: the checkpoint's safetensors files
    :param sparse_format: the format its config.json names
    :return: the sparse weights and the plain tensors
    :raises UsageError: naming tensor and file, if a part is missing or a weight is stored twice
    """
    stored = _headers(files)
    wanted = sparse_format.parts
    owners: dict[str, str] = {}
    parts: set[str] = set()
    for name in stored:
        owner, _, suffix = name.rpartition(".")
        if suffix not in _MARKERS or not owner or not wanted:
            continue
        for part in wanted:
            if f"{owner}.{part}" not in stored:
                raise UsageError(
                    f"{name} in {stored[name][0]} has no {owner}.{part} beside it, which {sparse_format} needs: "
                    "the checkpoint is incomplete, fetch or write it again"
                )
        dense = dense_name(owner)
        if dense in stored:
            raise UsageError(
                f"{dense} is stored twice, dense in {stored[dense][0]} and sparse in {stored[name][0]}: "
                "write the checkpoint again"
            )
        owners[owner] = stored[f"{owner}.compressed"][0]
        parts.update(f"{owner}.{part}" for part in wanted)
    plain = {name: dtype for name, (_, dtype) in stored.items() if name not in parts}
    return CheckpointParts(owners, plain)


def _headers(files: Iterable[str | Path]) -> dict[str, tuple[str, str]]:
    """Name → (file name, safetensors dtype name) over all shards."""
    from safetensors import SafetensorError, safe_open

    stored: dict[str, tuple[str, str]] = {}
    for file in map(Path, files):
        if file.suffix != ".safetensors":
            raise UsageError(f"{file.name} isn't a safetensors file; sparse checkpoints are stored in no other kind")
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - not a mapping
                    if name in stored:
                        raise UsageError(f"{name} is stored in {stored[name][0]} and again in {file.name}: keep one")
                    stored[name] = (file.name, shard.get_slice(name).get_dtype())
        except SafetensorError as error:
            raise UsageError(f"{file.name} isn't a readable safetensors file ({error}): fetch it again") from error
    return stored
