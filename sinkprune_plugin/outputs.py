"""Directories of results that appear whole or not at all."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sinkprune_plugin.errors import UsageError

__all__ = ["check_output", "new_directory"]


def check_output(path: Path, *, overwrite: bool, needed_bytes: int = 0) -> None:
    """Refuse an output directory before any work is done for it.

    :param path: directory to be written
    :param overwrite: replace a directory that has something in it
    :param needed_bytes: estimate of what will be written
    :raises UsageError: if the path is taken or the disk too full
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"output {path} is a file; name a directory that doesn't exist yet")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        count = sum(1 for _ in path.iterdir())
        raise UsageError(f"output {path} exists and has {count} entries; choose another directory or pass --overwrite")
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise UsageError(
            f"output {path} needs about {needed_bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; free "
            "some space or choose another disk"
        )


@contextlib.contextmanager
def new_directory(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Write into a directory beside ``path`` and rename it at the end; on failure nothing is left behind.

    :param path: directory to be written
    :param overwrite: replace a directory that has something in it
    :return: the directory to write into
    :raises UsageError: if the path is taken
    """
    check_output(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        # mkdtemp makes it private; the result should have the permissions of any new directory.
        beside.chmod(0o755)
        yield beside
        if path.exists():
            retired = beside.with_name(f"{beside.name}.old")
            path.rename(retired)
            beside.rename(path)
            shutil.rmtree(retired)
        else:
            beside.rename(path)
    finally:
        if beside.exists():
            shutil.rmtree(beside)
