"""Choices of a kernel that outlive a process: a shape is measured once on each kind of GPU. Needs torch alone.

A compiled model is kept on disk by vLLM and loaded by the next process, so a choice that came out differently there
would meet code that was compiled for the other one.
"""

import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sinkprune_plugin.vllm.sparse_kernel import MEASURED_ROWS, KernelChoice

__all__ = ["KernelChoices", "key_of"]


def key_of(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> str:
    """What a choice depends on: the shape, the kind of GPU, and the libraries.

    :param rows: of the weight
    :param columns: of the weight
    :param dtype: of weight and activations
    :param device: the GPU
    :return: key of the choice
    """
    gpu = torch.cuda.get_device_name(device)
    library = torch.backends.cusparselt.version()
    return f"{rows}x{columns} {dtype} on {gpu}, torch {torch.__version__}, cuSPARSELt {library}, rows {MEASURED_ROWS}"


class KernelChoices:
    """A JSON file of choices.

    :param path: the file; made where there is none
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, key: str, decide: Callable[[], KernelChoice]) -> KernelChoice:
        """A choice, made and written down if it is the first of its kind.

        :param key: from :func:`key_of`
        :param decide: makes it
        :return: the choice
        """
        # Whatever is no choice is measured anew: the file may be damaged, or another version's.
        with suppress(KeyError, TypeError, ValueError):
            stored: Any = self._read()[key]
            if isinstance(stored["sparse"], bool) and isinstance(stored["algorithm"], int):
                gains = tuple(float(gain) for gain in stored["gains"])
                return KernelChoice(stored["sparse"], stored["algorithm"], gains)
        choice = decide()
        self._write(key, choice)
        return choice

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, key: str, choice: KernelChoice) -> None:
        # Read again: another process may have measured another shape meanwhile. Without room or permission the choice
        # holds for this process only.
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({**self._read(), key: asdict(choice)}, indent=1, sort_keys=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False, encoding="utf-8") as file:
                file.write(text)
            Path(file.name).replace(self._path)
