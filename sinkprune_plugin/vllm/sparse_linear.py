"""Linears with 2:4 sparse weights on the sparse tensor cores of NVIDIA GPUs, where that is measured to be faster.

A denoising step runs whole blocks or canvases of many requests through the model, so its matrix products have many
rows, which is where 2:4 pays off: cuSPARSELt reads half of the weight and does half of the multiplications. By how much
depends on the shape and the GPU, so each shape is measured once, when the first weight of that shape has been loaded.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from sinkprune_plugin.formats.codecs import bitmask24, bits

__all__ = ["MEASURED_ROWS", "Sparse24LinearMethod", "fits_kernel", "is_faster", "is_two_of_four", "sparse_tensor_cores"]

logger = init_logger("vllm.sinkprune")

# From one block of 32 tokens of 8 requests to whole canvases.
MEASURED_ROWS = (256, 1024, 4096)

_REPEATS = 10
# The sparse kernel must be clearly faster: a smaller gain is within the noise of the measurement.
_LEAST_GAIN = 1.05
# What torch requires of 16-bit operands for cuSPARSELt: multiples of 16 in the weight and of 8 in the activations.
# Its other kernel requires two and four times that; no projection of a real model is narrower.
_ROWS, _COLUMNS, _TOKENS = 32, 64, 8


def sparse_tensor_cores() -> bool:
    """Whether this process can multiply 2:4 weights: a GPU of compute capability 8.0 or more, and cuSPARSELt."""
    return bool(
        current_platform.is_cuda()
        and current_platform.has_device_capability(80)
        and torch.backends.cusparselt.is_available()
    )


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


def is_faster(dense: Sequence[float], sparse: Sequence[float]) -> bool:
    """Whether the sparse kernel is worth it.

    :param dense: seconds of the dense product for each number of rows
    :param sparse: the same of the sparse product
    :return: whether it is faster by 5 % in the geometric mean
    """
    gain = sum(math.log(slow / fast) for slow, fast in zip(dense, sparse, strict=True)) / len(dense)
    return gain > math.log(_LEAST_GAIN)


def sparse_product(x: torch.Tensor, packed: torch.Tensor, out_features: int) -> torch.Tensor:
    """x Wᵀ with a compressed weight.

    :param x: (T, in)
    :param packed: W (out, in) as ``torch._cslt_compress`` gives it
    :param out_features: rows of W
    :return: (T, out)
    """
    tokens = x.shape[0]
    # The kernel computes W xᵀ and wants a multiple of 8 columns; it stores the transpose of the result.
    padded = F.pad(x, (0, 0, 0, -tokens % _TOKENS)) if tokens % _TOKENS else x.contiguous()
    result = torch._cslt_sparse_mm(packed, padded.t(), transpose_result=True)
    assert result.shape[1] == out_features
    return result[:tokens]


def _sparse_product_shape(x: torch.Tensor, packed: torch.Tensor, out_features: int) -> torch.Tensor:  # noqa: ARG001
    return x.new_empty((x.shape[0], out_features))


@functools.cache
def _register_op() -> Any:
    """Make the product an operator that torch.compile takes as it is, without looking at the padding."""
    from vllm.utils.torch_utils import direct_register_custom_op

    library = torch.library.Library("sinkprune", "FRAGMENT")
    direct_register_custom_op("sparse_product", sparse_product, fake_impl=_sparse_product_shape, target_lib=library)
    # An operator lives as long as its library object, which the cache keeps.
    return library, torch.ops.sinkprune.sparse_product


@functools.cache
def _worth_it(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Measure one shape, on random weights."""
    weight = torch.randn(rows, columns, dtype=dtype, device=device)
    weight.view(-1, 4)[:, 2:] = 0
    packed = torch._cslt_compress(weight)
    dense_times, sparse_times = [], []
    for tokens in MEASURED_ROWS:
        x = torch.randn(tokens, columns, dtype=dtype, device=device)
        dense_times.append(_seconds(functools.partial(F.linear, x, weight)))
        sparse_times.append(_seconds(functools.partial(sparse_product, x, packed, rows)))
    chosen = is_faster(dense_times, sparse_times)
    gains = ", ".join(f"{slow / fast:.2f}" for slow, fast in zip(dense_times, sparse_times, strict=True))
    logger.info(
        "2:4 weights of (%d, %d) run %s: sparse against dense %s times as fast at %s rows",
        rows,
        columns,
        "on sparse tensor cores" if chosen else "dense",
        gains,
        ", ".join(map(str, MEASURED_ROWS)),
    )
    return chosen


def _seconds(run: Callable[[], torch.Tensor]) -> float:
    """Median time of a call on the GPU, in seconds."""
    times = []
    for _ in range(3 + _REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    # The first few calls initialise kernels.
    return sorted(times[3:])[_REPEATS // 2]


def runs_sparse(weight: torch.Tensor) -> bool:
    """Whether to keep a weight compressed.

    :param weight: (out, in) of this rank, loaded
    """
    rows, columns = weight.shape
    return (
        weight.is_cuda
        and fits_kernel((rows, columns), weight.dtype)
        and is_two_of_four(weight)
        and _worth_it(rows, columns, weight.dtype, weight.device)
    )


class Sparse24LinearMethod(LinearMethodBase):
    """Loads like any Linear; then keeps the weight either dense or compressed, never both."""

    def __init__(self) -> None:
        self._dense = UnquantizedLinearMethod()
        self._product: Any = None
        self._out_features = 0

    def create_weights(self, layer: torch.nn.Module, *weight_args: Any, **extra_weight_attrs: Any) -> None:
        """See the base class."""
        self._dense.create_weights(layer, *weight_args, **extra_weight_attrs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Choose; see the base class."""
        weight: Any = layer.weight.data
        self._product = None
        if runs_sparse(weight):
            self._product, self._out_features = _register_op()[1], weight.shape[0]
            replace_parameter(layer, "weight", torch._cslt_compress(weight))
        else:
            self._dense.process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See the base class."""
        if self._product is None:
            return self._dense.apply(layer, x, bias)
        y = self._product(x.reshape(-1, x.shape[-1]), layer.weight, self._out_features)
        y = y.view(*x.shape[:-1], self._out_features)
        return y if bias is None else y + bias
