"""The closed list of checkpoint formats, and the names a checkpoint spells them with.

Text from a file is compared with these names and never used to look anything up, let alone to import it.
"""

from enum import StrEnum

from sinkprune_plugin.errors import UsageError, short

__all__ = ["AUTO", "LAYOUTS", "LEGACY_METHOD", "QUANT_METHOD", "CheckpointFormat", "parse_format"]

AUTO = "auto"
"""Selects the smallest of the formats that every target fits."""

QUANT_METHOD = "compressed-tensors-sparse"
"""``quant_method`` of a checkpoint that only this package reads: others refuse it instead of loading it incorrectly."""

LEGACY_METHOD = "compressed-tensors"
"""``quant_method`` of the releases of compressed-tensors that could read sparse checkpoints."""

LAYOUTS = ("sinkprune", "legacy")
"""Which of the two a writer puts into config.json; the tensors are the same."""


class CheckpointFormat(StrEnum):
    """How the weights of a checkpoint are stored."""

    DENSE = "dense"
    SPARSE_BITMASK = "sparse-bitmask"
    SPARSE_24_BITMASK = "sparse-24-bitmask"

    @property
    def parts(self) -> tuple[str, ...]:
        """Local names of the tensors that make up one weight; none for a dense one."""
        match self:
            case CheckpointFormat.DENSE:
                return ()
            case CheckpointFormat.SPARSE_BITMASK:
                return ("compressed", "bitmask", "shape", "row_offsets")
            case CheckpointFormat.SPARSE_24_BITMASK:
                return ("compressed", "bitmask", "shape")

    @property
    def structure(self) -> str:
        """Value of ``sparsity_structure`` in config.json."""
        return "2:4" if self is CheckpointFormat.SPARSE_24_BITMASK else "unstructured"


def parse_format(name: object, where: str) -> CheckpointFormat:
    """Find the format with a name.

    :param name: what a user or a file says
    :param where: what to call the place in an error
    :return: the format
    :raises UsageError: if there is none of that name
    """
    for known in CheckpointFormat:
        if isinstance(name, str) and name == known.value:
            return known
    known_names = ", ".join(CheckpointFormat)
    raise UsageError(f"{where} is '{short(name)}'; the formats are {known_names}: fix {where}")
