"""How long decoder blocks of given sizes take on this machine: a small table, timed in turns."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.offload import get_execution_device

from sinkprune_plugin.devices import input_device
from sinkprune_plugin.diffusion.families import block_length_of
from sinkprune_plugin.models.sizes_in_config import BlockSizes
from sinkprune_plugin.modifiers.replaced_forward import forward_replaced
from sinkprune_plugin.sampling.kv_cache import KeyValueCache
from sinkprune_plugin.sampling.tokens import LOW_CONFIDENCE, Needs, propose

__all__ = ["LatencyTable", "time_blocks"]

# Rounds at least and at most; between the two as many as take this many seconds for each shape: on a CPU that others
# use too the median of a few calls says little.
FEWEST, MOST, SECONDS = 7, 60, 0.5
WARM_UP = 2
# LLaDA's usual block.
BLOCK_LENGTH = 32


@dataclass(frozen=True)
class LatencyTable:
    """Medians in seconds, of rounds made comparable.

    :param blocks: one block of each size
    :param rest: the rest of a denoising step: embedding, final norm, and for an open block of 32 positions, or the
        model's own, the vocabulary projection and the choice of tokens
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

    The blocks have random weights and the model's class, dtype and device. Of a model that denoises block by block, an
    open block at the end of the sequence is computed, with the keys and values of what precedes it kept. Memory: one
    block of every size.

    :param model: a native model
    :param blocks: its decoder blocks
    :param sizes: sizes to time
    :param batch_size: sequences in a call
    :param tokens: tokens of a sequence
    :return: the table
    """
    config: Any = model.config
    own = block_length_of(config)
    opened = tokens if own is None else min(own, tokens)
    ids = torch.randint(config.vocab_size, (batch_size, opened), generator=torch.Generator().manual_seed(0))
    ids = ids.to(input_device(model))
    inputs = {"input_ids": ids}
    if own is not None:
        inputs["position_ids"] = torch.arange(tokens - opened, tokens, device=ids.device)[None]
    call = _first_call(model, blocks[0], inputs)
    device = torch.device(get_execution_device(blocks[0]))
    dtype = call.call_args[0].dtype
    calls: dict[BlockSizes | None, Callable[[], Any]] = {}
    for each in sizes:
        block = type(blocks[0])(config, each).to(device=device, dtype=dtype).eval()
        calls[each] = _calling(block, call) if own is None else _calling_open(block, call, tokens - opened, tokens)
    calls[None] = lambda: _choose_tokens(model(**inputs, logits_to_keep=own or BLOCK_LENGTH).logits)
    skipped = [(block, lambda hidden_states, *_args, **_kwargs: hidden_states) for block in blocks]
    with torch.no_grad(), forward_replaced(skipped):
        first = {key: [_timed(function, device) for _ in range(WARM_UP)][-1] for key, function in calls.items()}
        rounds = min(MOST, max(FEWEST, math.ceil(SECONDS * len(calls) / sum(first.values()))))
        seconds = [{key: _timed(function, device) for key, function in calls.items()} for _ in range(rounds)]
    weights = {each: _linear_weights(config, type(blocks[0]), each) for each in sizes}
    return _table(seconds, weights)


def _table(seconds: Sequence[Mapping[BlockSizes | None, float]], weights: Mapping[BlockSizes, int]) -> LatencyTable:
    """Medians that survive a machine on which others work too.

    :param seconds: for each round the time of each block size, and of the rest under None
    :param weights: weights of the Linears of a block of each size
    """
    totals = [sum(each.values()) for each in seconds]
    usual = statistics.median(totals)
    # A round in which everything took longer says as much of the proportions as any other.
    medians = {
        key: statistics.median(each[key] * usual / total for each, total in zip(seconds, totals, strict=True))
        for key in seconds[0]
    }
    blocks = {key: value for key, value in medians.items() if key is not None}
    largest = max(weights, key=lambda each: weights[each])
    # A smaller block saves at most its share of the operations. What seems to save more is noise, on which a search
    # would build.
    blocks = {key: max(value, blocks[largest] * weights[key] / weights[largest]) for key, value in blocks.items()}
    return LatencyTable(blocks, medians[None])


def _choose_tokens(logits: torch.Tensor) -> None:
    """What the sampler does with the logits of the open block, greedily and by confidence."""
    rows = logits.flatten(0, 1)
    zeros = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    propose(
        rows,
        temperature=zeros.double(),
        top_k=zeros,
        top_p=zeros.double() + 1,
        remasking=zeros,
        seed=zeros,
        step=zeros,
        position=zeros,
        mask_token_id=0,
        needs=Needs(noise=False, filters=False, remaskings=(LOW_CONFIDENCE,)),
    )


def _linear_weights(config: Any, block_class: Any, sizes: BlockSizes) -> int:
    with torch.device("meta"):
        block = block_class(config, sizes)
    return sum(each.weight.numel() for each in block.modules() if isinstance(each, torch.nn.Linear))


def _first_call(
    model: torch.nn.Module, block: torch.nn.Module, inputs: Mapping[str, torch.Tensor]
) -> _BlockReachedError:
    def reached(*args: Any, **kwargs: Any) -> Any:
        raise _BlockReachedError(args, kwargs)

    with torch.no_grad(), forward_replaced([(block, reached)]), contextlib.suppress(StopIteration):
        try:
            model(**inputs)
        except _BlockReachedError as call:
            return call
    raise RuntimeError("the model never called its first decoder block")


def _calling(block: torch.nn.Module, call: _BlockReachedError) -> Callable[[], Any]:
    return lambda: block(*call.call_args, **call.call_kwargs)


def _calling_open(block: torch.nn.Module, call: _BlockReachedError, begin: int, end: int) -> Callable[[], Any]:
    cache = KeyValueCache(end)

    def function() -> Any:
        with cache.computing(begin, end):
            return block(*call.call_args, **call.call_kwargs)

    return function


def _timed(function: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
