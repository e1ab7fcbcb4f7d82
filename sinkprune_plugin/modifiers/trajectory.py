"""The passes of a diffusion calibration: every batch at every timestep of the grid, or once without noise.

A model that denoises block by block meets an open block after clean ones. Its passes hold the clean window and the
noisy one, so that each of them has all blocks at this timestep, each given the clean blocks before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from sinkprune_plugin.diffusion import (
    DiffusionSpec,
    NoisyInputs,
    clean_inputs,
    corrupt,
    noisy_inputs,
    sample_generator,
    timestep_weight,
)
from sinkprune_plugin.modifiers.calibration import CalibrationBatch
from sinkprune_plugin.modifiers.passes import CalibrationPass

__all__ = [
    "CorruptionSource",
    "TrajectoryCorruption",
    "clean_pass",
    "corrupted_passes",
    "spec_of",
    "window_copies",
    "without_sinks",
]


class CorruptionSource(Protocol):
    """Where the noise of a calibration pass comes from."""

    def __call__(self, batch: CalibrationBatch, step_index: int, timestep: float) -> torch.Tensor:
        """Corrupt a batch.

        :param batch: clean samples
        :param step_index: index of the timestep on the grid
        :param timestep: t in (0, 1]
        :return: (B, T) int64 corrupted token ids on CPU
        """
        ...


@dataclass(frozen=True)
class TrajectoryCorruption:
    """The family's forward process (paper section 3.1), seeded by the sample's own content.

    The noise of a sample at a timestep depends on ``seed``, the timestep and the sample alone, so batch size, order
    and the number of processes don't change the statistics.

    :param spec: family and mask token of the model
    :param seed: the recipe's ``seed``
    :param noise_eps: floor of the mask probability
    """

    spec: DiffusionSpec
    seed: int
    noise_eps: float

    def __call__(self, batch: CalibrationBatch, step_index: int, timestep: float) -> torch.Tensor:
        """Corrupt a batch; see :class:`CorruptionSource`."""
        rows = batch.input_ids if batch.valid is None else _real_tokens(batch)
        generators = [sample_generator(self.seed, step_index, row) for row in rows]
        corruption = corrupt(
            batch.input_ids,
            timestep,
            self.spec,
            noise_eps=self.noise_eps,
            generators=generators,
            attention_mask=batch.valid,
        )
        return corruption.noisy_ids


def _real_tokens(batch: CalibrationBatch) -> list[torch.Tensor]:
    assert batch.valid is not None
    return [row[valid] for row, valid in zip(batch.input_ids, batch.valid, strict=True)]


def corrupted_passes(
    batches: Sequence[CalibrationBatch], grid: Sequence[float], corruption: CorruptionSource
) -> list[CalibrationPass]:
    """Noise every batch for every timestep.

    :param batches: clean samples
    :param grid: timesteps t in (0, 1]
    :param corruption: source of the noise
    :return: one pass for each batch and timestep, a batch's passes in the order of the grid; all real tokens count 1
    """
    spec = spec_of(corruption)
    return [
        _pass_of(batch, noisy_inputs(corruption(batch, step_index, timestep), batch.input_ids, spec, batch.valid))
        for batch in batches
        for step_index, timestep in enumerate(grid)
    ]


def spec_of(corruption: CorruptionSource | None) -> DiffusionSpec | None:
    """The model's diffusion spec; None where recorded noise takes the place of the family's.

    :param corruption: source of the noise
    """
    return corruption.spec if isinstance(corruption, TrajectoryCorruption) else None


def window_copies(corruption: CorruptionSource | None) -> int:
    """How many times a noisy pass holds its window, rounded up.

    :param corruption: source of the noise
    """
    spec = spec_of(corruption)
    return 1 if spec is None or spec.block_length is None else 2


def without_sinks(
    passes: Sequence[CalibrationPass], masks: Sequence[torch.Tensor], grid: Sequence[float], weighting: str
) -> list[CalibrationPass]:
    """Give corrupted passes the weights of their tokens and timesteps.

    :param passes: the corrupted passes, all timesteps of a batch one after the other
    :param masks: one (B, S, T) float32 sink mask m for each batch
    :param grid: timesteps
    :param weighting: the recipe's ``timestep_weighting``
    :return: the same passes, each token with 1 − m of its own timestep
    """
    weighted = []
    for number, each in enumerate(passes):
        index, step = divmod(number, len(grid))
        mask = masks[index][:, step]
        weights = each.row_weights.to(mask.device) * (1.0 - mask)
        weighted.append(replace(each, row_weights=weights, square_scale=timestep_weight(grid[step], weighting)))
    return weighted


def clean_pass(batch: CalibrationBatch, spec: DiffusionSpec | None = None) -> CalibrationPass:
    """The pass of a batch without noise.

    :param batch: clean samples
    :param spec: the model's diffusion spec, if it denoises block by block
    :return: the pass; all real tokens count 1
    """
    # No token of it is there for the others only.
    return _pass_of(batch, replace(clean_inputs(batch.input_ids, spec, batch.valid), context=0))


def _pass_of(batch: CalibrationBatch, inputs: NoisyInputs) -> CalibrationPass:
    weights = torch.ones(inputs.arguments["input_ids"].shape) if inputs.valid is None else inputs.valid.float()
    return CalibrationPass(
        inputs.arguments,
        weights,
        source=f"calibration batch {batch.index}",
        valid=inputs.valid,
        context=inputs.context,
    )
