"""How long decoder blocks of given sizes take on this machine: a small table, timed in turns."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.offload import get_execution_device

from sinkprune_plugin.devices import input_device
from sinkprune_plugin.models.sizes_in_config import BlockSizes
from sinkprune_plugin.modifiers.replaced_forward import forward_replaced

__all__ = ["LatencyTable", "time_blocks"]

# A shape is timed this often at least and at most, and until its calls have taken so many seconds together: on a CPU
# that others use too the median of a few calls says little.
FEWEST, MOST, SECONDS = 7, 60, 0.5
WARM_UP = 2


@dataclass(frozen=True)
class LatencyTable:
    """Medians in seconds.

    :param blocks: one block of each size
    :param rest: a forward pass without its blocks: embedding, final norm and vocabulary projection
    """

    blocks: dict[BlockSizes, float]
    rest: float


class _BlockReachedError(Exception):
    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.call_args, self.call_kwargs = args, kwargs


def time_blocks(
    model: torch.nn.Module, blocks: torch.nn.ModuleList, sizes: Collection[BlockSizes], batch_size: int, tokens: int
) -> LatencyTable:
    """Time blocks of several sizes and the rest of the model, one call of each after the other, round after round.

    The blocks have random weights and the model's class, dtype and device. Memory: one block of every size.

    :param model: a native model
    :param blocks: its decoder blocks
    :param sizes: sizes to time
    :param batch_size: sequences in a call
    :param tokens: tokens of a sequence
    :return: the table
    """
    config: Any = model.config
    ids = torch.randint(config.vocab_size, (batch_size, tokens), generator=torch.Generator().manual_seed(0))
    ids = ids.to(input_device(model))
    call = _first_call(model, blocks[0], ids)
    device = torch.device(get_execution_device(blocks[0]))
    dtype = call.call_args[0].dtype
    calls: dict[BlockSizes | None, Callable[[], Any]] = {}
    for each in sizes:
        block = type(blocks[0])(config, each).to(device=device, dtype=dtype).eval()
        calls[each] = _calling(block, call)
    calls[None] = lambda: model(input_ids=ids)
    skipped = [(block, lambda hidden_states, *_args, **_kwargs: hidden_states) for block in blocks]
    with torch.no_grad(), forward_replaced(skipped):
        seconds = {key: [_timed(function, device) for _ in range(WARM_UP)][-1:] for key, function in calls.items()}
        rounds = {key: min(MOST, max(FEWEST, math.ceil(SECONDS / first[0]))) for key, first in seconds.items()}
        for turn in range(max(rounds.values())):
            for key, function in calls.items():
                if turn < rounds[key]:
                    seconds[key].append(_timed(function, device))
    medians = {key: statistics.median(values[1:]) for key, values in seconds.items()}
    return LatencyTable({key: value for key, value in medians.items() if key is not None}, medians[None])


def _first_call(model: torch.nn.Module, block: torch.nn.Module, ids: torch.Tensor) -> _BlockReachedError:
    def reached(*args: Any, **kwargs: Any) -> Any:
        raise _BlockReachedError(args, kwargs)

    with torch.no_grad(), forward_replaced([(block, reached)]), contextlib.suppress(StopIteration):
        try:
            model(input_ids=ids)
        except _BlockReachedError as call:
            return call
    raise RuntimeError("the model never called its first decoder block")


def _calling(block: torch.nn.Module, call: _BlockReachedError) -> Callable[[], Any]:
    return lambda: block(*call.call_args, **call.call_kwargs)


def _timed(function: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
