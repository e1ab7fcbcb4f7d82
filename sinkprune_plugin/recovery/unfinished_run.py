"""The directory of a run that isn't finished: states to resume from, and what they belong to."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from sinkprune_plugin.errors import UsageError, short

__all__ = ["UnfinishedRun"]

_SETTINGS = "run.json"
# The Trainer writes it last, so a directory without it is a state that was cut off.
_LAST_WRITTEN = "trainer_state.json"


class UnfinishedRun:
    """Next to the output, so that it survives an interruption, and is removed once the output is there.

    :param output: directory of the result
    """

    def __init__(self, output: Path) -> None:
        self.directory = output.with_name(f"{output.name}.unfinished")

    @property
    def states(self) -> Path:
        """Where the Trainer's states go."""
        return self.directory / "states"

    @property
    def predictions(self) -> Path:
        """Where the dense model's predictions go."""
        return self.directory / "predictions"

    def begin(self, settings: dict[str, Any], *, resume: bool, overwrite: bool) -> Path | None:
        """Make the directory, or check that it belongs to the same run.

        :param settings: everything that determines the result, JSON-serialisable
        :param resume: go on with what is there
        :param overwrite: throw away what is there
        :return: the latest complete state to resume from; None to begin at the start
        :raises UsageError: if there is a run and neither was asked for, or if it had other settings
        """
        file = self.directory / _SETTINGS
        settings = json.loads(json.dumps(settings))
        if self.directory.exists() and overwrite and not resume:
            shutil.rmtree(self.directory)
        if not self.directory.exists():
            self.states.mkdir(parents=True)
            file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
            return None
        if not resume:
            raise UsageError(
                f"{self.directory} holds a recovery that was interrupted; pass --resume to go on with it, or "
                "--overwrite to begin again"
            )
        try:
            earlier = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{file} can't be read; remove {self.directory} and begin again") from error
        for name, value in settings.items():
            if earlier.get(name) != value:
                raise UsageError(
                    f"{self.directory} was made with {name} {short(earlier.get(name))}, not {short(value)}; use the "
                    "same settings, or --overwrite without --resume to begin again"
                )
        return self._latest_state()

    def _latest_state(self) -> Path | None:
        complete = {}
        for directory in self.states.glob("checkpoint-*"):
            number = re.fullmatch(r"checkpoint-(\d+)", directory.name)
            if number and (directory / _LAST_WRITTEN).is_file():
                complete[int(number[1])] = directory
            elif number:
                shutil.rmtree(directory, ignore_errors=True)
        return complete[max(complete)] if complete else None

    def remove(self) -> None:
        """Remove the directory."""
        shutil.rmtree(self.directory, ignore_errors=True)


def fingerprint(windows: torch.Tensor) -> str:
    """Tells one text from another.

    :param windows: (N, T) int64
    :return: 16 hexadecimal digits
    """
    digest = hashlib.blake2b(windows.contiguous().numpy().tobytes(), digest_size=8)
    return f"{digest.hexdigest()}"
