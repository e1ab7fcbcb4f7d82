"""Digests of weight files: they reveal a changed value where the formats themselves can't.

SHA-256, so that ``sha256sum`` and the pages of a model hub show the same number. On processors with SHA instructions it
is also the fastest in hashlib. A file is read once more for its digest after it is written, and once when it is loaded.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from sinkprune_plugin.errors import UsageError, short
from sinkprune_plugin.formats.files.stored_weights import SparseWeight

__all__ = ["check_digest", "check_digest_names", "file_digest"]


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits.

    :param file: the file
    :raises UsageError: if it can't be read
    """
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{file} can't be read: {error.strerror}") from error


def check_digest_names(digests: Mapping[str, str] | None, files: Iterable[Path]) -> None:
    """Check that the files are those that have digests, without reading them.

    :param digests: file name → digest, None if config.json has none
    :param files: the checkpoint's weight files
    :raises UsageError: naming the file that is missing or too many
    """
    if digests is None:
        return
    names = {file.name for file in files}
    odd = sorted(names.symmetric_difference(digests))
    if odd:
        what = "has no digest" if odd[0] in names else "has a digest but isn't one of the weight files"
        raise UsageError(
            f"{short(odd[0])} {what} in config.json; fetch the checkpoint again, or delete sinkprune_sha256 from "
            "config.json if the weights were split again"
        )


def check_digest(digests: Mapping[str, str] | None, file: Path, weights: Iterable[SparseWeight]) -> None:
    """Compare a file with its digest.

    :param digests: file name → digest, None if config.json has none
    :param file: one of the weight files
    :param weights: the checkpoint's sparse weights, in which the damage is located
    :raises UsageError: if it differs, naming the tensor where that can be determined
    """
    if digests is None or file_digest(file) == digests[file.name]:
        return
    for weight in weights:
        if any(entry.file == file for entry in weight.parts.values()):
            weight.read()
    raise UsageError(
        f"{file} isn't the file that was written: its SHA-256 differs from the one in config.json; fetch or write the "
        "checkpoint again"
    )
