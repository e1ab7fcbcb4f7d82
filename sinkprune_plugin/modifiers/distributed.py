"""Samples split over ranks, statistics summed: the few collective operations that calibration needs."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["gather_objects", "rank", "sum_over_ranks", "world_size"]


def world_size() -> int:
    """Number of processes that calibrate together; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process; 0 without ``torch.distributed``."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_ranks(tensors: Iterable[torch.Tensor]) -> None:
    """Add up each tensor over all processes, in place. Every process passes the same shapes in the same order.

    :param tensors: statistics, on any device
    """
    if world_size() == 1:
        return
    for tensor in tensors:
        # NCCL moves device memory only.
        shared = tensor.to(torch.accelerator.current_accelerator()) if dist.get_backend() == "nccl" else tensor
        dist.all_reduce(shared, op=dist.ReduceOp.SUM)
        tensor.copy_(shared)


def gather_objects(value: Any) -> list[Any]:
    """Collect one picklable value from every process, in rank order.

    :param value: this process's value
    :return: one value a process
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
