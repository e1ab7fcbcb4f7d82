"""Which calibration passes a block is fitted on in each step, and which ones are held out."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["FitPlan", "PassId", "plan_fit"]

# Rank of the process that holds a pass, and the pass's number there.
PassId = tuple[int, int]


@dataclass(frozen=True)
class FitPlan:
    """The order of the passes, the same one in every process and for every block.

    :param steps: passes of each optimizer step
    :param held_out: passes that are never trained on
    """

    steps: tuple[tuple[PassId, ...], ...]
    held_out: tuple[PassId, ...]


def plan_fit(
    windows: Sequence[int], timesteps: int, *, step_passes: int, epochs: int, held_out: float, seed: int
) -> FitPlan:
    """Plan the steps so that they don't depend on the number of processes.

    Windows of all processes are numbered in turn, as they were dealt out, and consecutive ones share a step: each
    process then has about the same part of it. In an epoch each window has each of its timesteps once, in random order.
    A window is held out with all its timesteps, as they have most of their tokens in common.

    :param windows: number of windows (batches) of each process
    :param timesteps: passes of a window, which a process has one after the other
    :param step_passes: passes of a step
    :param epochs: how often each pass is trained on
    :param held_out: share of the windows that are held out, in [0, 1); at least one window unless it is 0, and none if
        there is only one
    :param seed: seed of the order
    :return: the plan
    """
    turns = range(max(windows))
    numbered = [(rank, turn) for turn in turns for rank, count in enumerate(windows) if turn < count]
    held = min(max(1, round(held_out * len(numbered))), len(numbered) - 1) if held_out else 0
    trained = len(numbered) - held
    generator = torch.Generator().manual_seed(seed)
    order: list[tuple[int, int]] = []
    for _ in range(epochs):
        steps = torch.stack([torch.randperm(timesteps, generator=generator) for _ in range(trained)])
        for turn in range(timesteps):
            first = int(torch.randint(trained, (), generator=generator))
            order += [
                (window % trained, int(steps[window % trained, turn])) for window in range(first, first + trained)
            ]
    passes = [(numbered[window][0], numbered[window][1] * timesteps + step) for window, step in order]
    kept = [(rank, turn * timesteps + step) for rank, turn in numbered[trained:] for step in range(timesteps)]
    # What is left over is less than a step.
    count = max(1, len(passes) // step_passes)
    return FitPlan(
        tuple(tuple(passes[index * step_passes : (index + 1) * step_passes]) for index in range(count)), tuple(kept)
    )
