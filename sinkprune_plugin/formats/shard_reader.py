"""Finding the files of a checkpoint and reading single tensors from them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats.bits import zeros
from sinkprune_plugin.formats.safetensors_header import TORCH_DTYPES, TensorEntry, read_header

__all__ = ["CONFIG_NAME", "INDEX_NAME", "SINGLE_NAME", "read_bytes", "read_entries", "read_json", "read_tensor"]

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_PIECE = 16 << 20


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping.

    :param file: the file
    :return: its content
    :raises UsageError: naming the file
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{file} can't be read: {error.strerror}") from error
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
    if not directory.is_dir():
        raise UsageError(f"{directory} isn't a directory; name the directory of a checkpoint")
    if (directory / SINGLE_NAME).is_file():
        return read_header(directory / SINGLE_NAME)
    index = directory / INDEX_NAME
    if not index.is_file():
        raise UsageError(f"{directory} has neither {SINGLE_NAME} nor {INDEX_NAME}; convert the weights to safetensors")
    weight_map = _weight_map(index)
    entries: dict[str, TensorEntry] = {}
    for name in sorted(set(weight_map.values())):
        if not (directory / name).is_file():
            raise UsageError(f"{index} names {name}, which isn't there; fetch the file or write the checkpoint again")
        for tensor, entry in read_header(directory / name).items():
            if tensor in entries:
                raise UsageError(f"{tensor} is in {entries[tensor].file} and again in {entry.file}; keep one")
            entries[tensor] = entry
    for tensor, name in weight_map.items():
        if tensor not in entries or entries[tensor].file.name != name:
            raise UsageError(f"{index} says that {name} holds {tensor[:200]!r}, which it doesn't; fetch both again")
    return entries


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{index} has no weight_map; fetch or write it again")
    for name in weight_map.values():
        # Only files beside the index: nothing a checkpoint says makes us open another one.
        plain = isinstance(name, str) and name.isprintable() and "\\" not in name and Path(name).name == name
        if not plain or not name.endswith(".safetensors"):
            raise UsageError(
                f"{index} names {str(name)[:200]!r}, which isn't a *.safetensors file beside it; correct it"
            )
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
    """Read a tensor into memory of its own.

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
            # A single call reads at most 2 GiB.
            while done < len(target):
                count = stream.readinto(target[done:])
                if not count:
                    raise UsageError(f"{entry.file} has shrunk while {entry.name} was read; fetch or write it again")
                done += count
    except OSError as error:
        raise UsageError(f"{entry.name} can't be read from {entry.file}: {error.strerror}") from error
