"""Directories of results that appear whole or not at all.

Everything is written into a hidden directory on the disk of the result and moved into place at the end, with renames
only. A link is followed. A directory that exists is filled and not replaced: it keeps its owner and permissions, and
may be a mount point or somebody's working directory. What others put into it meanwhile is never removed; the new result
is then kept under another name.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.termination import removed_on_termination, uninterrupted

__all__ = ["check_output", "new_directory", "scratch_directory", "updated_directory"]

_MARK = ".partial-"
# A file system's limit is 255 bytes, a character has up to four.
_LONGEST_NAME = 48
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _ChangedMeanwhileError(OSError):
    """Another program wrote to the place of the result."""


# Type, number, size and time of the last change of a file; of a directory only type and number.
_State = Mapping[Path, tuple[int, ...]]


def check_output(path: Path, *, overwrite: bool, needed_bytes: int = 0) -> None:
    """Refuse an output directory before any work is done for it.

    :param path: directory to be written; a link is followed
    :param overwrite: replace a directory that has something in it
    :param needed_bytes: estimate of what will be written
    :raises UsageError: if the path is taken, can't be written, or the disk is too full
    """
    with _in_one_line(path):
        target = _resolved(path)
        if target.exists() and not target.is_dir():
            raise UsageError(f"output {path} is a file; name a directory that doesn't exist yet")
        count = sum(1 for _ in _entries(target)) if target.is_dir() else 0
        if count and not overwrite:
            raise UsageError(
                f"output {path} exists and has {count} entries; choose another directory or pass --overwrite"
            )
        place = next(each for each in (target, *target.parents) if os.path.lexists(each))
        if not place.is_dir():
            raise UsageError(f"output {path} lies under {place}, which isn't a directory; choose another place")
        if not os.access(place, os.W_OK | os.X_OK):
            raise UsageError(f"output {path} can't be written: no permission to write in {place}; choose another place")
        free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise UsageError(
            f"output {path} needs about {needed_bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; free "
            "some space or choose another disk"
        )


@contextlib.contextmanager
def scratch_directory(path: Path) -> Iterator[Path]:
    """A hidden directory for intermediate files, on the disk of an output, removed at the end whatever happens.

    :param path: the output; the directory lies in it if it exists, else next to it
    :return: an empty directory
    :raises UsageError: if it can't be made or the disk gets full
    """
    with _in_one_line(path):
        target = _resolved(path)
        parent = target if target.is_dir() else target.parent
        missing = [each for each in (parent, *parent.parents) if not each.exists()]
        # Not in the directory for temporary files, which may be on another disk or in memory.
        scratch = parent / f".{target.name[:_LONGEST_NAME]}{_MARK}{secrets.token_hex(6)}"
    with removed_on_termination(scratch):
        try:
            with _in_one_line(path):
                # mkdir and not mkdtemp, whose directories are private: permissions as of any new directory in this
                # place.
                scratch.mkdir(parents=True)
            yield scratch
        except (OSError, SafetensorError) as error:
            number = _system_error(error)
            if number in _DISK_FULL:
                raise UsageError(f"output {path} can't be written: {os.strerror(number)}; free some space") from error
            raise
        finally:
            with uninterrupted():
                shutil.rmtree(scratch, ignore_errors=True)
                for each in missing:
                    with contextlib.suppress(OSError):
                        # Refused if it holds a result.
                        each.rmdir()


@contextlib.contextmanager
def new_directory(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Write a directory as a whole, in place of everything that was in it. On failure all stays as it was.

    :param path: directory to be written; a link is followed
    :param overwrite: replace what is in it
    :return: the directory to write into
    :raises UsageError: if the path is taken or the disk full; also if another program wrote there meanwhile, which then
        stays, and the message says where the new result is
    """
    check_output(path, overwrite=overwrite)
    with scratch_directory(path) as scratch:
        target = _resolved(path)
        # Without leave to overwrite, what came between the check above and this line is kept as well.
        before = _state(_below(target)) if overwrite else {}
        new = scratch / "new"
        new.mkdir()
        yield new
        _open_up(new)
        with uninterrupted(), _kept_on_failure(path, scratch):
            if scratch.parent != target:
                try:
                    # Fails unless the place is free, or an empty directory.
                    new.rename(target)
                except OSError as error:
                    if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                        raise _ChangedMeanwhileError from error
                    raise
                return
            if _state(_below(target)) != before:
                raise _ChangedMeanwhileError
            _move_in(target, scratch, outgoing=_entries(target), incoming=new.iterdir())


@contextlib.contextmanager
def updated_directory(path: Path, *, stale: Sequence[str] = ()) -> Iterator[Path]:
    """Write several files into a directory at once. On failure all stays as it was.

    Files of the same names are replaced, those of other names stay, as with ``save_pretrained``.

    :param path: directory to be written; a link is followed
    :param stale: patterns of names in it that are removed where they aren't written again
    :return: the directory to write into
    :raises UsageError: if the path is a file or the disk full; also if another program changed one of these files
        meanwhile, which then stay, and the message says where the new ones are
    """
    check_output(path, overwrite=True)
    with scratch_directory(path) as scratch:
        target = _resolved(path)
        before = _state(_entries(target))
        new = scratch / "new"
        new.mkdir()
        yield new
        _open_up(new)
        with uninterrupted(), _kept_on_failure(path, scratch):
            if not target.exists():
                new.rename(target)
                return
            incoming = [file for file in _below(new) if file.is_symlink() or not file.is_dir()]
            replaced = {target / file.relative_to(new) for file in incoming}
            replaced |= {file for pattern in stale for file in target.glob(pattern)}
            outgoing = sorted(file for file in replaced if os.path.lexists(file))
            for file, state in _state(outgoing).items():
                if stat.S_ISDIR(state[0]):
                    raise IsADirectoryError(errno.EISDIR, f"{file} is a directory")
                # What lies deeper isn't checked before, as the directory may belong to others.
                if file.parent == target and before.get(file) != state:
                    raise _ChangedMeanwhileError
            _move_in(target, scratch, outgoing=outgoing, incoming=incoming)


def _open_up(new: Path) -> None:
    """Give files the permissions of any new file in this place: those of safetensors are private."""
    sample = new.with_name("sample")
    sample.touch()
    usual = stat.S_IMODE(sample.stat().st_mode)
    for file in _below(new):
        mode = file.lstat().st_mode
        if stat.S_ISREG(mode) and mode | usual != mode:
            file.chmod(stat.S_IMODE(mode) | usual)


def _move_in(target: Path, scratch: Path, *, outgoing: Iterable[Path], incoming: Iterable[Path]) -> None:
    new, old = scratch / "new", scratch / "old"
    moves = [(file, old / file.relative_to(target)) for file in outgoing]
    moves += [(file, target / file.relative_to(new)) for file in incoming]
    done: list[tuple[Path, Path]] = []
    try:
        for source, place in moves:
            place.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(place):
                # A rename would silently replace a file.
                raise _ChangedMeanwhileError
            source.rename(place)
            done.append((source, place))
    except OSError:
        for source, place in reversed(done):
            # As many as possible; the caller handles the rest.
            with contextlib.suppress(OSError):
                place.rename(source)
        raise


@contextlib.contextmanager
def _kept_on_failure(path: Path, scratch: Path) -> Iterator[None]:
    """Save a finished result that can't be moved into its place, and old files that couldn't be moved back."""
    try:
        yield
    except OSError as error:
        kept = scratch.with_name(scratch.name.removeprefix(".").replace(_MARK, "-"))
        old = scratch / "old"
        if any(file.is_symlink() or not file.is_dir() for file in _below(old)):
            scratch.rename(kept)
            raise UsageError(
                f"output {path} can't be replaced: {error.strerror}; what was in it is in {kept / 'old'} and the new "
                f"result in {kept / 'new'}"
            ) from error
        (scratch / "new").rename(kept)
        if isinstance(error, _ChangedMeanwhileError):
            what = "was changed by another program meanwhile and is left as it is"
        else:
            what = f"can't be written: {error.strerror}"
        raise UsageError(f"output {path} {what}; the new result is in {kept}") from error


@contextlib.contextmanager
def _in_one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"output {path} can't be written: {error.strerror}; choose another place") from error


def _system_error(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # safetensors' errors have the system's number only in their text.
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _resolved(path: Path) -> Path:
    loop = UsageError(f"output {path} is a link that leads to itself; choose another place")
    try:
        target = path.resolve()
    except RuntimeError as error:
        raise loop from error
    if target.is_symlink():
        # How Python reports it from 3.13 on.
        raise loop
    return target


def _entries(directory: Path) -> Iterator[Path]:
    """What is in a directory, without directories of this module that are being written or were left by a crash."""
    if directory.is_dir():
        yield from (each for each in directory.iterdir() if not (each.name.startswith(".") and _MARK in each.name))


def _below(directory: Path) -> Iterator[Path]:
    """Everything in a directory and in those below it; links are not followed."""
    for entry in _entries(directory):
        yield entry
        if not entry.is_symlink():
            yield from _below(entry)


def _state(files: Iterable[Path]) -> _State:
    state: dict[Path, tuple[int, ...]] = {}
    for file in files:
        found = file.lstat()
        state[file] = found.st_mode, found.st_ino
        if not stat.S_ISDIR(found.st_mode):
            state[file] += found.st_size, found.st_mtime_ns
    return state
