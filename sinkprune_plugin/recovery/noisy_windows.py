"""Windows of text with noise, in an order that depends on seed and position alone."""

from typing import Any

import torch

from sinkprune_plugin.diffusion import DiffusionSpec, check_block_window, corrupt, sample_generator
from sinkprune_plugin.errors import UsageError

__all__ = ["NoisyWindows", "split_windows"]

NOISE_EPS = 1e-3
# Noise samples of a held-out window: each covers another part of the noise levels.
HELD_OUT_SAMPLES = 4
# More windows would cost more time than they add in certainty: all states are compared on the same noise.
MOST_HELD_OUT = 16


class NoisyWindows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Draws of a window and its noise. Draw i is the same whenever and wherever it is made, so that neither resuming
    nor the number of processes changes the data.

    The timesteps of ``strata`` draws in a row cover (0, 1] evenly, one in each of as many equal parts.

    :param windows: (N, T) int64 clean token ids
    :param spec: the model's diffusion spec
    :param draws: number of draws; windows repeat after N of them, in another order
    :param strata: parts of (0, 1]
    :param seed: seed of order and noise
    :param shuffle: False takes the windows in their order
    """

    def __init__(
        self, windows: torch.Tensor, spec: DiffusionSpec, *, draws: int, strata: int, seed: int, shuffle: bool = True
    ) -> None:
        self.windows = windows
        self._spec, self._draws, self._strata, self._seed, self._shuffle = spec, draws, strata, seed, shuffle
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self._draws

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One draw.

        :param index: its number
        :return: ``input_ids`` (T,) int64 noisy, ``clean`` (T,) int64, ``corrupted`` (T,) bool, ``p_mask`` () float32
            and ``draw`` () int64, the index
        """
        window = self.windows[self._window(index)]
        generator = sample_generator(self._seed, index, window)
        offset = torch.rand((), generator=generator, dtype=torch.float64).item()
        timestep = 1 - (index % self._strata + offset) / self._strata
        noise = corrupt(window[None], [timestep], self._spec, noise_eps=NOISE_EPS, generators=[generator])
        return {
            "input_ids": noise.noisy_ids[0],
            "clean": window,
            "corrupted": noise.corrupted[0],
            "p_mask": noise.p_mask[0],
            "draw": torch.tensor(index),
        }

    def _window(self, index: int) -> int:
        epoch, place = divmod(index, len(self.windows))
        if not self._shuffle:
            return place
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(len(self.windows), generator=generator).tolist()
        return self._order[1][place]


def split_windows(
    windows: torch.Tensor, spec: DiffusionSpec, *, held_out: float, steps: int, batch_size: int, seed: int
) -> tuple[NoisyWindows, NoisyWindows]:
    """Windows to train on and windows to check with, disjoint.

    :param windows: (N, T) int64
    :param spec: the model's diffusion spec
    :param held_out: share of the latter; at least one window and at most 16
    :param steps: optimiser steps
    :param batch_size: draws of a step
    :param seed: seed of order and noise
    :return: training draws, held-out draws
    :raises UsageError: if there aren't enough windows for both, or their length doesn't fit the model's blocks
    """
    check_block_window(windows.shape[1], spec)
    count = max(1, min(round(held_out * len(windows)), MOST_HELD_OUT))
    if len(windows) - count < 1:
        raise UsageError(
            f"the text gives {len(windows)} windows and {count} are held out, which leaves none to train on; use more "
            "text or a smaller --seq-len"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    training = NoisyWindows(
        windows[order[count:]], spec, draws=steps * batch_size, strata=batch_size, seed=seed, shuffle=True
    )
    draws = count * HELD_OUT_SAMPLES
    return training, NoisyWindows(windows[order[:count]], spec, draws=draws, strata=draws, seed=seed + 1, shuffle=False)


def batch_of(draws: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Draws as one batch.

    :param draws: draws of windows of one length
    :return: the same keys, each with a first dimension more
    """
    return torch.utils.data.default_collate(draws)
