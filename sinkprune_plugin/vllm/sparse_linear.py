"""Linears with 2:4 sparse weights on the sparse tensor cores of NVIDIA GPUs, where that is measured to be faster.

A denoising step runs whole blocks or canvases of many requests through the model, so its matrix products have many
rows, which is where 2:4 pays off. Each shape is measured once for each kind of GPU (see
:mod:`~sinkprune_plugin.vllm.kernel_choices`). What was chosen for each layer becomes a part of vLLM's configuration
before the model is compiled, so that its hash, which names vLLM's compile cache, is another one with another choice.
"""

import functools
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from vllm import envs
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed.parallel_state import get_tp_group, model_parallel_is_initialized
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from sinkprune_plugin.vllm.kernel_choices import KernelChoices, key_of
from sinkprune_plugin.vllm.sparse_kernel import (
    MEASURED_ROWS,
    KernelChoice,
    fits_kernel,
    is_two_of_four,
    measure,
    sparse_product,
)

__all__ = ["CHOICES_KEY", "Sparse24LinearMethod", "choose_kernel", "sparse_tensor_cores"]

logger = init_logger("vllm.sinkprune")

# Key in vLLM's ``additional_config``, a free-form part of its configuration that is hashed with it.
CHOICES_KEY = "sinkprune_two_of_four"


def sparse_tensor_cores() -> bool:
    """Whether this process can multiply 2:4 weights: a GPU of compute capability 8.0 or more, and cuSPARSELt."""
    return bool(
        current_platform.is_cuda()
        and current_platform.has_device_capability(80)
        and torch.backends.cusparselt.is_available()
    )


def _sparse_product_shape(
    x: torch.Tensor,
    packed: torch.Tensor,  # noqa: ARG001
    out_features: int,
    algorithm: int = 0,  # noqa: ARG001
) -> torch.Tensor:
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
def _choice_of_shape(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> KernelChoice:
    """The choice for a shape: the first rank's, for all of them."""
    group = get_tp_group() if model_parallel_is_initialized() else None
    choice = None
    if group is None or group.is_first_rank:
        file = KernelChoices(Path(envs.VLLM_CACHE_ROOT) / "sinkprune" / "two_of_four.json")
        choice = file.get(
            key_of(rows, columns, dtype, device), functools.partial(measure, rows, columns, dtype, device)
        )
    if group is not None and group.world_size > 1:
        choice = group.broadcast_object(choice)
    assert choice is not None
    logger.info(
        "2:4 weights of (%d, %d) run %s: sparse against dense %s times as fast at %s rows",
        rows,
        columns,
        f"on sparse tensor cores, algorithm {choice.algorithm}" if choice.sparse else "dense",
        ", ".join(f"{gain:.2f}" for gain in choice.gains) or "not",
        ", ".join(map(str, MEASURED_ROWS)),
    )
    return choice


def _on_all_ranks(true: bool) -> bool:
    """Whether something holds on every tensor-parallel rank."""
    group = get_tp_group() if model_parallel_is_initialized() else None
    if group is None or group.world_size == 1:
        return true
    flag = torch.tensor(int(true))
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return bool(flag)


def choose_kernel(weight: torch.Tensor) -> KernelChoice:
    """How a weight runs; the same on all ranks, which must all ask for the same layers in the same order.

    :param weight: (out, in) of this rank, loaded
    :return: the choice
    """
    rows, columns = weight.shape
    if not weight.is_cuda or not fits_kernel((rows, columns), weight.dtype):
        return KernelChoice(sparse=False)
    choice = _choice_of_shape(rows, columns, weight.dtype, weight.device)
    # One rank's slice may hold the only group with more than two weights.
    if choice.sparse and not _on_all_ranks(is_two_of_four(weight)):
        return KernelChoice(sparse=False)
    return choice


class Sparse24LinearMethod(LinearMethodBase):
    """Loads like any Linear; then keeps the weight either dense or compressed, never both.

    :param prefix: the layer's full name
    """

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._dense = UnquantizedLinearMethod()
        self._choice = KernelChoice(sparse=False)
        self._product: Any = None
        self._out_features = 0
        # The one that the model is built with, and compiled with later.
        self._config = get_current_vllm_config_or_none()

    def create_weights(self, layer: torch.nn.Module, *weight_args: Any, **extra_weight_attrs: Any) -> None:
        """See the base class."""
        self._dense.create_weights(layer, *weight_args, **extra_weight_attrs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Choose; see the base class."""
        weight: Any = layer.weight.data
        self._choice, self._product = choose_kernel(weight), None
        self._note_choice()
        if self._choice.sparse:
            self._product, self._out_features = _register_op()[1], weight.shape[0]
            replace_parameter(layer, "weight", torch._cslt_compress(weight))
        else:
            self._dense.process_weights_after_loading(layer)

    def _note_choice(self) -> None:
        # Another platform's configuration may be an object of its own, with its own hash; CUDA's is a dictionary.
        if self._config is not None and isinstance(self._config.additional_config, dict):
            layers = self._config.additional_config.setdefault(CHOICES_KEY, {})
            layers[self._prefix] = f"algorithm {self._choice.algorithm}" if self._choice.sparse else "dense"

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See the base class."""
        if self._product is None:
            return self._dense.apply(layer, x, bias)
        y = self._product(x.reshape(-1, x.shape[-1]), layer.weight, self._out_features, self._choice.algorithm)
        y = y.view(*x.shape[:-1], self._out_features)
        return y if bias is None else y + bias
