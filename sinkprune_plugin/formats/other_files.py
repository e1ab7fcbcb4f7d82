"""What else is in a checkpoint's directory: tokenizer, generation settings, chat template, recipe."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats.shard_reader import CONFIG_NAME

__all__ = ["copy_other_files", "other_files"]

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


def other_files(directory: Path) -> Iterator[Path]:
    """Files to be taken over as they are: all but weights, config.json and hidden ones.

    :param directory: checkpoint directory
    :return: their paths, relative to it
    """
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or path.name.endswith(_WEIGHTS):
            continue
        if path.is_dir():
            # A linked directory may lead anywhere, itself included.
            if not path.is_symlink():
                yield from (Path(path.name) / file for file in other_files(path))
        elif path.name != CONFIG_NAME:
            yield Path(path.name)


def copy_other_files(source: Path, target: Path) -> None:
    """Copy them.

    :param source: checkpoint directory
    :param target: the new checkpoint's directory
    :raises UsageError: naming the file that can't be copied
    """
    for file in other_files(source):
        try:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            # Content alone: the copy belongs to whoever makes it, whatever the original's permissions.
            shutil.copyfile(source / file, target / file)
        except OSError as error:
            raise UsageError(f"{source / file} can't be copied: {error.strerror}; remove it or free space") from error
