"""Finding the files of a checkpoint and reading single tensors from them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sinkprune_plugin.errors import UsageError, short
from sinkprune_plugin.formats.codecs.bits import zeros
from sinkprune_plugin.formats.files.safetensors_header import TORCH_DTYPES, TensorEntry, read_header

__all__ = [
    "CONFIG_NAME",
    "INDEX_NAME",
    "SINGLE_NAME",
    "index_of",
    "read_bytes",
    "read_entries",
    "read_headers",
    "read_json",
    "read_tensor",
]

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_PIECE = 16 << 20
# The index of the largest models has about 10 MB.
_LARGEST_JSON = 100_000_000
# The length that file systems allow.
_LONGEST_FILE_NAME = 255


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping.

    :param file: the file
    :return: its content
    :raises UsageError: naming the file
    """
    try:
        with file.open("rb") as stream:
            text = stream.read(_LARGEST_JSON + 1)
        if len(text) > _LARGEST_JSON:
            raise UsageError(f"{file} has over {_LARGEST_JSON // 1_000_000} MB of JSON; fetch or write it again")
        content = json.loads(text.decode("utf-8"))
    except OSError as error:
        raise UsageError(f"{file} can't be read: {error.strerror}") from error
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} isn't readable JSON ({type(error).__name__}); fetch or write it again") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file} holds a {type(content).__name__}, not a mapping; fetch or write it again")
    return content


def read_entries(directory: Path) -> dict[str, TensorEntry]:
    """Read the headers of a checkpoint's weight files.

    The files are those that ``model.safetensors.index.json`` names, or ``model.safetensors`` alone.

    :param directory: checkpoint directory
    :return: name → entry, file by file
    :raises UsageError: if a file is missing or damaged, or a name is taken twice
    """
    try:
        if not directory.is_dir():
            raise UsageError(f"{short(directory)} isn't a directory; name the directory of a checkpoint")
        if (directory / SINGLE_NAME).is_file():
            return read_headers([directory / SINGLE_NAME])
        index = directory / INDEX_NAME
        if not index.is_file():
            raise UsageError(
                f"{directory} has neither {SINGLE_NAME} nor {INDEX_NAME}; convert the weights to safetensors"
            )
        files = [directory / name for name in sorted(set(_weight_map(index).values()))]
        return read_headers([file for file in files if file.is_file()], index)
    except OSError as error:
        raise UsageError(f"{short(directory)} can't be read: {error.strerror}") from error


def read_headers(files: Sequence[Path], index: Path | None = None) -> dict[str, TensorEntry]:
    """Read the headers of some weight files and compare them with their index.

    :param files: safetensors files
    :param index: the index that names them, None for files without one
    :return: name → entry, file by file
    :raises UsageError: if a file is damaged or isn't there, a name is taken twice, or the index says something else
    """
    weight_map = {} if index is None else _weight_map(index)
    missing = set(weight_map.values()) - {file.name for file in files}
    if missing:
        raise UsageError(
            f"{index} names {min(missing)}, which isn't there; fetch the file or write the checkpoint again"
        )
    entries: dict[str, TensorEntry] = {}
    for file in files:
        if file.suffix != ".safetensors":
            raise UsageError(f"{file.name} isn't a safetensors file; sparse checkpoints are stored in no other kind")
        for tensor, entry in read_header(file).items():
            if tensor in entries:
                raise UsageError(f"{tensor} is in {entries[tensor].file} and again in {entry.file}; keep one")
            entries[tensor] = entry
    for tensor, name in weight_map.items():
        if tensor not in entries or entries[tensor].file.name != name:
            raise UsageError(f"{index} says that {name} holds '{short(tensor)}', which it doesn't; fetch both again")
    return entries


def index_of(files: Sequence[Path], directory: Path | None = None) -> Path | None:
    """The index of weight files that another loader has found.

    :param files: safetensors files
    :param directory: the checkpoint's directory, where they may be in a subfolder; None for that of the first file
    :return: the index; None where there is none or a lone file doesn't need it
    :raises UsageError: if an index led the loader out of the directory
    """
    folder = files[0].parent
    for file in files:
        outside = directory is not None and (
            not file.is_relative_to(directory) or ".." in file.parts[len(directory.parts) :]
        )
        if outside or file.parent != folder:
            raise UsageError(
                f"{short(file)} isn't in {short(directory or folder)}; put a checkpoint's files in one place"
            )
    if len(files) == 1 and files[0].name == SINGLE_NAME:
        return None
    return next((index for place in (folder, directory or folder) if (index := place / INDEX_NAME).is_file()), None)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{index} has no weight_map; fetch or write it again")
    for name in weight_map.values():
        # Only files next to the index: nothing in a checkpoint makes us open another one.
        plain = isinstance(name, str) and name.isprintable() and "\\" not in name and Path(name).name == name
        if not plain or not name.endswith(".safetensors") or len(name.encode()) > _LONGEST_FILE_NAME:
            raise UsageError(f"{index} names '{short(name)}', which isn't a *.safetensors file next to it; correct it")
    return weight_map


def read_bytes(entry: TensorEntry) -> Iterator[memoryview]:
    """Read a tensor's data in pieces, each valid until the next is asked for.

    :param entry: where it is
    :return: 16 MiB at a time
    :raises UsageError: if the file can't be read or has shrunk
    """
    buffer = memoryview(bytearray(min(entry.nbytes, _PIECE)))
    for offset in range(0, entry.nbytes, _PIECE):
        piece = buffer[: min(_PIECE, entry.nbytes - offset)]
        _read_into(piece, entry, offset)
        yield piece


def read_tensor(entry: TensorEntry) -> torch.Tensor:
    """Read a tensor into its own memory.

    :param entry: where it is
    :return: the tensor
    :raises UsageError: if torch has no such dtype, or the file can't be read or has shrunk
    """
    dtype = TORCH_DTYPES.get(entry.dtype)
    if dtype is None:
        raise UsageError(f"{entry.name} in {entry.file} is {entry.dtype}, which torch can't hold; leave it out")
    data = zeros(entry.nbytes, torch.int8, torch.device("cpu"))
    _read_into(data.view(torch.uint8).numpy().data, entry, 0)
    return data.view(dtype).view(entry.shape)


def _read_into(target: memoryview, entry: TensorEntry, offset: int) -> None:
    try:
        with entry.file.open("rb", buffering=0) as stream:
            stream.seek(entry.begin + offset)
            done = 0
            # One call reads at most 2 GiB.
            while done < len(target):
                count = stream.readinto(target[done:])
                if not count:
                    raise UsageError(f"{entry.file} has shrunk while {entry.name} was read; fetch or write it again")
                done += count
    except OSError as error:
        raise UsageError(f"{entry.name} can't be read from {entry.file}: {error.strerror}") from error
