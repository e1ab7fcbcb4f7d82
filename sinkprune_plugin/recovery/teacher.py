"""The dense model's predictions: from the model itself, or from disk, where they were put once."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from sinkprune_plugin.devices import input_device
from sinkprune_plugin.diffusion import (
    DiffusionSpec,
    TopPredictions,
    noisy_inputs,
    predict_noisy,
    predictions,
    top_predictions,
)
from sinkprune_plugin.recovery.noisy_windows import NoisyWindows, batch_of

__all__ = ["LiveTeacher", "StoredTeacher", "Teacher", "store_predictions", "stored_bytes"]

# From a batch of draws to the predictions of its corrupted tokens.
Teacher = Callable[[Mapping[str, torch.Tensor]], "torch.Tensor | TopPredictions"]

# Draws in a file: large enough that files are few, small enough that little is lost by an interruption.
DRAWS_PER_FILE = 256


class LiveTeacher:
    """Predictions of a model that is in memory.

    :param model: dense model, not trained
    :param spec: its diffusion spec
    """

    def __init__(self, model: torch.nn.Module, spec: DiffusionSpec) -> None:
        self._model = model.eval().requires_grad_(requires_grad=False)
        self._spec = spec

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Predict.

        :param batch: a batch of draws
        :return: (K, V) logits
        """
        with torch.no_grad():
            inputs = noisy_inputs(batch["input_ids"], batch["clean"], self._spec)
            logits = predict_noisy(self._model, inputs, input_device(self._model))
            return predictions(logits, batch["corrupted"], self._spec)


class StoredTeacher:
    """Predictions from disk.

    :param directory: what :func:`store_predictions` filled
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: tuple[int, Any] = (-1, None)

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> TopPredictions:
        """Look up.

        :param batch: a batch of draws that were stored
        :return: their most likely tokens, on CPU
        """
        ids, values = [], []
        for draw in batch["draw"].tolist():
            number = draw // DRAWS_PER_FILE
            if self._open[0] != number:
                self._open = number, safe_open(_file(self._directory, number), framework="pt")
            ids.append(self._open[1].get_tensor(f"{draw}.ids").long())
            values.append(self._open[1].get_tensor(f"{draw}.log_probabilities").float())
        return TopPredictions(torch.cat(ids), torch.cat(values))


def stored_bytes(draws: NoisyWindows, top_k: int) -> int:
    """Bytes that :func:`store_predictions` will need: half of all tokens are corrupted on average.

    :param draws: draws
    :param top_k: predictions for each corrupted token, four bytes for the id and two for the probability
    """
    return math.ceil(len(draws) * draws.windows.shape[1] * 0.5 * top_k * 6)


def store_predictions(
    model: torch.nn.Module,
    draws: NoisyWindows,
    spec: DiffusionSpec,
    directory: Path,
    *,
    top_k: int,
    batch_size: int,
    progress: bool = True,
) -> None:
    """Write the dense model's most likely tokens for every draw. Files that are there already are kept.

    :param model: dense model
    :param draws: draws
    :param spec: the model's diffusion spec
    :param directory: where to; made if missing
    :param top_k: predictions for each corrupted token
    :param batch_size: draws in a forward pass
    :param progress: show a progress bar
    """
    directory.mkdir(parents=True, exist_ok=True)
    teacher = LiveTeacher(model, spec)
    starts = range(0, len(draws), DRAWS_PER_FILE)
    with tqdm(total=len(draws), desc="predictions of the dense model", unit="window", disable=not progress) as bar:
        for number, start in enumerate(starts):
            chosen = range(start, min(start + DRAWS_PER_FILE, len(draws)))
            file = _file(directory, number)
            if not file.is_file():
                tensors: dict[str, torch.Tensor] = {}
                for first in range(chosen.start, chosen.stop, batch_size):
                    batch = batch_of([draws[i] for i in range(first, min(first + batch_size, chosen.stop))])
                    top = top_predictions(teacher(batch), top_k)
                    counts = batch["corrupted"].sum(dim=1).tolist()
                    for draw, ids, values in zip(
                        batch["draw"].tolist(),
                        top.ids.cpu().split(counts),
                        top.log_probabilities.cpu().split(counts),
                        strict=True,
                    ):
                        tensors[f"{draw}.ids"] = ids.int().contiguous()
                        tensors[f"{draw}.log_probabilities"] = values.half().contiguous()
                # Whole or not at all: an interruption must not leave a file that looks finished.
                unfinished = file.with_suffix(".tmp")
                save_file(tensors, unfinished)
                unfinished.replace(file)
            bar.update(len(chosen))


def _file(directory: Path, number: int) -> Path:
    return directory / f"predictions-{number:05}.safetensors"
