"""The product with a 2:4 weight on sparse tensor cores, and the measurement of where it pays. Needs torch alone.

cuSPARSELt reads half of the weight and does half of the multiplications; by how much that is faster depends on shape,
GPU and algorithm, of which cuSPARSELt has several for each product.
"""

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from sinkprune_plugin.formats.codecs import bitmask24, bits

__all__ = [
    "LAUNCHES",
    "MEASURED_ROWS",
    "KernelChoice",
    "fits_kernel",
    "is_faster",
    "is_two_of_four",
    "measure",
    "seconds_per_launch",
    "sparse_product",
]

# From one block of 32 tokens of 8 requests to whole canvases.
MEASURED_ROWS = (256, 1024, 4096)
# Launches between two events: one by one, the time of a launch and not that of the kernel would be measured.
LAUNCHES = 20

_REPEATS = 5
# The sparse kernel must be clearly faster: a smaller gain is within the noise of the measurement.
_LEAST_GAIN = 1.05
# What torch requires of 16-bit operands for cuSPARSELt: multiples of 16 in the weight and of 8 in the activations.
# Its other kernel requires two and four times that; no projection of a real model is narrower.
_ROWS, _COLUMNS, _TOKENS = 32, 64, 8


@dataclass(frozen=True)
class KernelChoice:
    """How weights of one shape run.

    :param sparse: on sparse tensor cores, or dense
    :param algorithm: cuSPARSELt's number of the algorithm
    :param gains: times as fast as dense for each of :data:`MEASURED_ROWS`
    """

    sparse: bool
    algorithm: int = 0
    gains: tuple[float, ...] = ()


def fits_kernel(shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether the kernel takes weights of a shape.

    :param shape: (out, in) of this rank's slice
    :param dtype: of weight and activations
    """
    return (
        dtype in (torch.bfloat16, torch.float16)
        and min(shape) > 0
        and shape[0] % _ROWS == 0
        and shape[1] % _COLUMNS == 0
    )


def is_two_of_four(weight: torch.Tensor) -> bool:
    """Whether no group of four columns has more than two non-zeros.

    :param weight: (R, C), C a multiple of 4
    """
    return bitmask24.excess_groups(bits.nonzero_bits(weight.contiguous())) == 0


def sparse_product(x: torch.Tensor, packed: torch.Tensor, out_features: int, algorithm: int = 0) -> torch.Tensor:
    """x Wᵀ with a compressed weight.

    :param x: (T, in)
    :param packed: W (out, in) as ``torch._cslt_compress`` gives it
    :param out_features: rows of W
    :param algorithm: cuSPARSELt's number of the algorithm
    :return: (T, out)
    """
    tokens = x.shape[0]
    # The kernel computes W xᵀ and wants a multiple of 8 columns; it stores the transpose of the result.
    padded = F.pad(x, (0, 0, 0, -tokens % _TOKENS)) if tokens % _TOKENS else x.contiguous()
    result = torch._cslt_sparse_mm(packed, padded.t(), transpose_result=True, alg_id=algorithm)
    assert result.shape[1] == out_features
    return result[:tokens]


def is_faster(dense: Sequence[float], sparse: Sequence[float]) -> bool:
    """Whether the sparse kernel is worth it.

    :param dense: seconds of the dense product for each number of rows
    :param sparse: the same of the sparse product
    :return: whether it is faster by 5 % in the geometric mean
    """
    gain = sum(math.log(slow / fast) for slow, fast in zip(dense, sparse, strict=True)) / len(dense)
    return gain > math.log(_LEAST_GAIN)


def seconds_per_launch(run: Callable[[], torch.Tensor], event: Any = torch.cuda.Event) -> float:
    """Time of a kernel that is launched many times in a row, in seconds.

    :param run: launches it
    :param event: makes events that record a time on the device
    :return: the median of five batches of :data:`LAUNCHES`, divided by their number
    """
    times = []
    # The first batch initialises the kernel.
    for _ in range(1 + _REPEATS):
        begin, end = event(enable_timing=True), event(enable_timing=True)
        begin.record()
        for _ in range(LAUNCHES):
            run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / LAUNCHES)
    return statistics.median(times[1:])


def measure(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    device: torch.device | str,
    seconds: Callable[[Callable[[], torch.Tensor]], float] = seconds_per_launch,
) -> KernelChoice:
    """Measure one shape on random weights: dense, and with each algorithm that cuSPARSELt's search proposes.

    :param rows: of the weight
    :param columns: of the weight
    :param dtype: of weight and activations
    :param device: the GPU
    :param seconds: times a launch
    :return: the fastest over all of :data:`MEASURED_ROWS`
    """
    weight = torch.randn(rows, columns, dtype=dtype, device=device)
    weight.view(-1, 4)[:, 2:] = 0
    packed = torch._cslt_compress(weight)
    inputs = [torch.randn(tokens, columns, dtype=dtype, device=device) for tokens in MEASURED_ROWS]
    dense = [seconds(functools.partial(F.linear, x, weight)) for x in inputs]
    times = {}
    for algorithm in _algorithms(packed, inputs):
        try:
            times[algorithm] = [seconds(functools.partial(sparse_product, x, packed, rows, algorithm)) for x in inputs]
        except RuntimeError:
            # Found for one number of rows, and not there for another.
            continue
    if not times:
        return KernelChoice(sparse=False)
    best = min(times, key=lambda algorithm: math.prod(times[algorithm]))
    gains = tuple(round(slow / fast, 3) for slow, fast in zip(dense, times[best], strict=True))
    return KernelChoice(is_faster(dense, times[best]), best, gains)


def _algorithms(packed: torch.Tensor, inputs: Sequence[torch.Tensor]) -> list[int]:
    """cuSPARSELt's default, and what its search finds for each number of rows."""
    found = {0}
    for x in inputs:
        # Not every build of torch has the search, nor every GPU.
        try:
            found.add(int(torch._cslt_sparse_mm_search(packed, x.t(), transpose_result=True)))
        except (AttributeError, RuntimeError):
            break
    return sorted(found)
