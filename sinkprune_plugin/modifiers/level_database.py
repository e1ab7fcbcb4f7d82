"""Pruned weights at every level of a search, on disk: what its candidates are put together from.

One safetensors file for each Linear holds its weight at all levels of its block in the format ``sparse-bitmask``, so
that a level at 75 % takes under a third of the dense weight, and one level can be read alone. Files appear whole or not
at all, and a Linear whose file is there is not solved again.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats.codecs import bitmask
from sinkprune_plugin.outputs import check_output, updated_directory

__all__ = ["LevelDatabase", "weight_bytes"]

# Decoded weights that stay in memory once they were read, for models that take no more at all levels.
CACHE_BYTES = 2**30

STATE_FILE = "search.json"
_PARTS = ("shape", "compressed", "bitmask", "row_offsets")
_REMEDY = "remove the directory and start again"


def weight_bytes(W: torch.Tensor, sparsity: float) -> int:
    """Bytes of one weight at one level: values, a bit for each weight and an offset for each row.

    :param W: (rows, C) dense weight, of which only shape and dtype count
    :param sparsity: share of zeros
    """
    rows, columns = W.shape
    return round(rows * columns * (1 - sparsity)) * W.element_size() + rows * -(-columns // 8) + 8 * rows


class LevelDatabase:
    """The directory of one search. All processes read it; each writes the Linears that it solves.

    :param directory: where the files are or will be
    :param problem: fingerprint of all that the weights depend on
    :param needed_bytes: what all weights at all levels take on disk
    :param dense_bytes: what they would take decoded
    :raises UsageError: if the directory belongs to another search, or its disk has no room
    """

    def __init__(self, directory: Path, problem: str, *, needed_bytes: int, dense_bytes: int) -> None:
        self._directory = directory
        self._problem = problem
        self._cache: dict[tuple[str, int], torch.Tensor] = {}
        self._keeps = dense_bytes <= CACHE_BYTES
        found = self._read_file().get("problem", problem)
        if found != problem:
            raise UsageError(
                f"search_directory {directory} belongs to another search (model, data or fields differ); remove it or "
                "name another one"
            )
        there = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        check_output(directory, overwrite=True, needed_bytes=max(needed_bytes - there, 0))

    def read_state(self) -> dict[str, Any] | None:
        """Where the search stood when it was interrupted; None at the beginning.

        :raises UsageError: if the file is damaged
        """
        return self._read_file().get("search")

    def write_state(self, search: Mapping[str, Any] | None) -> None:
        """Save where the search stands; one process does it.

        :param search: values that ``json`` can write; None before it has begun, to claim the directory
        """
        with updated_directory(self._directory) as directory:
            text = json.dumps({"problem": self._problem, "search": search}, indent=1)
            (directory / STATE_FILE).write_text(text + "\n", encoding="utf-8")

    def has(self, name: str) -> bool:
        """Whether a Linear is there.

        :param name: full module name
        """
        return self._file(name).exists()

    def write(self, name: str, levels: Sequence[torch.Tensor], errors: Sequence[float], power: float) -> None:
        """Save a Linear.

        :param name: full module name
        :param levels: its pruned weight (rows, C) at each level
        :param errors: its error at each level, relative to the power
        :param power: sum of its squared outputs
        :raises UsageError: if the disk is full
        """
        parts = {
            f"{level}.{part}": value.cpu().contiguous()
            for level, weight in enumerate(levels)
            for part, value in bitmask.compress(weight, name=name).items()
        }
        with updated_directory(self._directory) as directory:
            metadata = {"errors": json.dumps(list(errors)), "power": json.dumps(power)}
            save_file(parts, directory / self._file(name).name, metadata=metadata)

    def errors(self, name: str) -> tuple[list[float], float]:
        """Errors of a Linear at its levels, and the power that they are relative to.

        :param name: full module name
        :raises UsageError: if its file is damaged
        """
        with self._opened(name) as file:
            metadata = file.metadata()
            return [float(value) for value in json.loads(metadata["errors"])], float(json.loads(metadata["power"]))

    def read(self, name: str, level: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """A pruned weight.

        :param name: full module name
        :param level: the level
        :param device: where it is wanted; it is decoded there, so that only its parts are moved
        :return: (rows, C), not to be changed
        :raises UsageError: if its file is damaged or gone
        """
        if (name, level) in self._cache:
            return self._cache[name, level]
        with self._opened(name) as file:
            parts = {part: file.get_tensor(f"{level}.{part}").to(device) for part in _PARTS}
            weight = bitmask.decompress(parts, name=name)
        if self._keeps:
            self._cache[name, level] = weight
        return weight

    def _file(self, name: str) -> Path:
        return self._directory / f"{name}.safetensors"

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        path = self._file(name)
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise UsageError(f"{path} can't be read ({error}); {_REMEDY}") from error

    def _read_file(self) -> dict[str, Any]:
        path = self._directory / STATE_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} can't be read ({error}); {_REMEDY}") from error
        if not isinstance(content, dict) or not isinstance(content.get("search"), dict | None):
            raise UsageError(f"{path} holds no state of a search; {_REMEDY}")
        return content
