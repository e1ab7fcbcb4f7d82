"""Calibration on several processes: samples split over ranks, statistics summed where they are solved.

Each weight has one owner. The owner gets the sum of all ranks' statistics, solves, and hands the result to the others.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from compressed_tensors.distributed import as_broadcastable, greedy_bin_packing
from compressed_tensors.offload import update_offload_parameter
from compressed_tensors.offload.cache import DistributedCPUCache, DistributedDiskCache, OffloadCache

from sinkprune_plugin.errors import UsageError

__all__ = [
    "assign_owners",
    "barrier",
    "failing_together",
    "gather_objects",
    "rank",
    "reduce_to_owner",
    "replace_weight",
    "store_weight",
    "sum_everywhere",
    "use_own_device",
    "world_size",
]


def world_size() -> int:
    """Number of processes that calibrate together; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process; 0 without ``torch.distributed``."""
    return dist.get_rank() if world_size() > 1 else 0


def use_own_device() -> None:
    """Make the accelerator of this process its current one, as llm-compressor's ``init_dist`` does.

    A script that calls ``init_process_group`` itself leaves every process on the first device, and collectives of NCCL
    then wait for each other.
    """
    if world_size() > 1 and torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK") or rank()))


def gather_objects(value: Any) -> list[Any]:
    """Collect one picklable value from every process, in rank order.

    :param value: this process's value
    :return: one value per process
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Stop every process if one of them fails in here, instead of leaving the others waiting for it.

    There must be no collective operation inside.

    :raises UsageError: on the processes that had no error of their own
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if world_size() == 1:
            raise
        failure = error
    texts = gather_objects(None if failure is None else f"{failure}")
    if failure is not None:
        raise failure
    for index, text in enumerate(texts):
        if text is not None:
            raise UsageError(f"process {index} of {world_size()} failed: {text}")


def assign_owners(names: Sequence[str], cost: Callable[[str], float]) -> dict[str, int]:
    """Spread work over the processes.

    :param names: names of the pieces, the same ones in the same order on every process
    :param cost: cost of a piece
    :return: name → rank of the process that does it
    """
    _, _, owners = greedy_bin_packing(list(names), world_size(), cost)
    return owners


def reduce_to_owner(tensor: torch.Tensor, owner: int) -> None:
    """Sum a tensor over all processes, in place on the owner; on the others its content is undefined afterwards.

    :param tensor: statistics, the same shape everywhere
    :param owner: rank that needs the sum
    """
    if world_size() == 1:
        return
    # NCCL moves device memory only, and a Hessian may be offloaded.
    shared = tensor.to(torch.accelerator.current_accelerator()) if dist.get_backend() == "nccl" else tensor
    dist.reduce(shared, dst=owner, op=dist.ReduceOp.SUM)
    if shared is not tensor and rank() == owner:
        tensor.copy_(shared)


def sum_everywhere(tensor: torch.Tensor) -> None:
    """Sum a tensor over all processes, in place on each of them.

    :param tensor: the same shape everywhere, on the device of the process
    """
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)


def replace_weight(
    module: torch.nn.Module, weight: torch.Tensor | None, owner: int, name: str = "weight"
) -> torch.Tensor:
    """Put a weight into a module on every process, also where it is offloaded.

    :param module: the module
    :param weight: the new weight on its owner, None elsewhere
    :param owner: rank that has it
    :param name: name of the parameter
    :return: the new weight, on every process
    """
    if weight is None:
        weight = torch.empty_like(getattr(module, name), memory_format=torch.contiguous_format)
    if world_size() == 1:
        update_offload_parameter(module, name, weight)
        return weight
    weight = weight.contiguous()
    dist.broadcast(as_broadcastable(weight), src=owner)
    store_weight(module, weight, owner, name)
    # Nobody reads the shared weight before it is there.
    barrier()
    return weight


def store_weight(module: torch.nn.Module, weight: torch.Tensor, owner: int = 0, name: str = "weight") -> None:
    """Put a weight that every process has into a module, also where it is offloaded; no process waits for another.

    :param module: the module
    :param weight: the new weight
    :param owner: rank that writes it where all processes share the offloaded one
    :param name: name of the parameter
    """
    cache = module._parameters
    if isinstance(cache, DistributedCPUCache | DistributedDiskCache) and rank() != owner:
        # All processes share this memory or file, and only its owner writes. What is onloaded here is a copy of it.
        offloaded = cache.offloaded_values[name]
        onloaded = OffloadCache.keep_onloaded_values.get(offloaded)
        if onloaded is not None and onloaded is not offloaded:
            with torch.no_grad():
                onloaded.copy_(weight)
    else:
        update_offload_parameter(module, name, weight)


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()
