"""The passes of a diffusion calibration: every batch at every timestep of the grid, or once without noise."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from sinkprune_plugin.diffusion import DiffusionSpec, corrupt, sample_generator, timestep_weight
from sinkprune_plugin.modifiers.calibration import CalibrationBatch
from sinkprune_plugin.modifiers.passes import CalibrationPass

__all__ = ["CorruptionSource", "TrajectoryCorruption", "clean_pass", "corrupted_passes", "without_sinks"]


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
    return [
        _pass_of(batch, corruption(batch, step_index, timestep))
        for batch in batches
        for step_index, timestep in enumerate(grid)
    ]


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


def clean_pass(batch: CalibrationBatch) -> CalibrationPass:
    """The pass of a batch without noise.

    :param batch: clean samples
    :return: the pass; all real tokens count 1
    """
    return _pass_of(batch, batch.input_ids)


def _pass_of(batch: CalibrationBatch, input_ids: torch.Tensor) -> CalibrationPass:
    # No mask where there is no padding: attention without a mask is the faster kernel.
    mask = None if batch.valid is None else batch.valid.to(torch.int64)
    weights = torch.ones(input_ids.shape) if mask is None else mask.to(torch.float32)
    return CalibrationPass(
        {"input_ids": input_ids, "attention_mask": mask}, weights, source=f"calibration batch {batch.index}"
    )
