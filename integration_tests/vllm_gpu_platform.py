"""vLLM's configuration as it is made on an H100, on a machine without one."""

import contextlib
import sys
import types

from vllm_engine import prepare_vllm


@contextlib.contextmanager
def simulated_gpu():
    """Within it, vLLM's own CUDA platform in place of the CPU's, with the properties of an H100.

    Configurations can be made and scheduled with; nothing can run.
    """
    prepare_vllm()
    import vllm.v1.executor.multiproc_executor
    import vllm.v1.executor.uniproc_executor
    import vllm.v1.worker.gpu.cudagraph_utils  # noqa: F401 - modules that look for CUDA when they are imported
    from vllm.platforms import current_platform

    from sinkprune_plugin.vllm.register import register

    register()
    # Compiled for CUDA only; the platform's module imports it for the operators.
    sys.modules.setdefault("vllm._C_stable_libtorch", types.ModuleType("vllm._C_stable_libtorch"))
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class H100(NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id=0):
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id=0):
            return "NVIDIA H100 80GB HBM3"

        @classmethod
        def get_device_total_memory(cls, device_id=0):
            return 80 * 2**30

        @classmethod
        def device_count(cls):
            return 1

        @classmethod
        def get_cuda_runtime_major(cls):
            return 13

        @classmethod
        def is_pin_memory_available(cls):
            return False

        @classmethod
        def get_global_graph_pool(cls):
            return object()

    # All of vLLM's modules hold the same object.
    before = type(current_platform)
    current_platform.__class__ = H100
    try:
        yield
    finally:
        current_platform.__class__ = before
