"""What else is in a checkpoint's directory: tokenizer, generation settings, chat template, recipe."""

import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from sinkprune_plugin.errors import UsageError, short
from sinkprune_plugin.formats.files.shard_reader import CONFIG_NAME

__all__ = ["OtherFiles", "copy_other_files", "find_other_files"]

# Weights in this or another format. They would contradict the new ones, or double the size.
_WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
)
# A tokenizer has up to some 30 MB. What is larger is weights under a name unknown here, or a file with a hole in it.
_LARGEST = 256_000_000


@dataclass(frozen=True)
class OtherFiles:
    """Files to be taken over as they are.

    :param files: path relative to the checkpoint's directory → the file itself, links resolved
    :param nbytes: size of all of them
    :param notes: one line for each file that is left out and might be needed
    """

    files: dict[Path, Path]
    nbytes: int = 0
    notes: tuple[str, ...] = ()


def find_other_files(directory: Path | None) -> OtherFiles:
    """Find all regular files but weights, config.json, hidden ones and very large ones.

    :param directory: checkpoint directory, None where there is none
    :return: the files
    :raises UsageError: for a link that leads nowhere or out of the checkpoint: a checkpoint's links must not make us
        copy other files of this machine. The links of a hub's cache into its own store of files are followed
    """
    if directory is None:
        return OtherFiles({})
    root = directory.resolve()
    files: dict[Path, Path] = {}
    notes: list[str] = []
    total = 0
    waiting = [directory]
    while waiting:
        try:
            for path in sorted(waiting.pop().iterdir()):
                if path.name.startswith(".") or path.name.endswith(_WEIGHTS) or path.name == CONFIG_NAME:
                    continue
                # A linked directory may lead anywhere, itself included.
                if path.is_dir():
                    waiting += [] if path.is_symlink() else [path]
                    continue
                file = _follow(path, root) if path.is_symlink() else path
                found = file.stat()
                if not stat.S_ISREG(found.st_mode):
                    continue
                relative = path.relative_to(directory)
                if found.st_size > _LARGEST:
                    notes.append(
                        f"{short(relative)} has {found.st_size / 1e6:.0f} MB, over the {_LARGEST / 1e6:.0f} MB of a "
                        "file that is copied along; left out"
                    )
                    continue
                files[relative] = file
                total += found.st_size
        except OSError as error:
            raise UsageError(f"{short(directory)} can't be read: {error.strerror}") from error
    return OtherFiles(files, total, tuple(notes))


def _follow(link: Path, root: Path) -> Path:
    try:
        file = link.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{link} is a link that leads nowhere; fetch the file or remove the link") from error
    # In a hub's cache models--OWNER--NAME/snapshots/REVISION is the checkpoint, and its files lie in
    # models--OWNER--NAME/blobs.
    stores = [parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots"]
    if not any(file.is_relative_to(place) for place in (root, *stores[:1])):
        raise UsageError(
            f"{link} is a link out of the checkpoint, to {short(file)}; put the file in its place or remove the link"
        )
    return file


def copy_other_files(others: OtherFiles, target: Path) -> None:
    """Copy them.

    :param others: the files
    :param target: the new checkpoint's directory
    :raises UsageError: naming the file that can't be copied
    """
    for relative, file in others.files.items():
        try:
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            # Content alone: the copy belongs to whoever makes it, whatever the original's permissions.
            shutil.copyfile(file, target / relative)
        except OSError as error:
            raise UsageError(f"{file} can't be copied: {error.strerror}; remove it or free space") from error
