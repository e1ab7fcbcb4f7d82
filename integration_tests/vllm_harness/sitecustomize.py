"""Lets vLLM's Model Runner V2 run on a machine without a GPU: its Triton kernels in Triton's interpreter.

Python imports this by itself where the folder is on PYTHONPATH, so that it reaches all of a server's processes. A test
harness only: on a GPU nothing of the kind is needed, and nothing in the package imports it.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import os
import sys
import types


class _Driver:
    """Says that there is a Triton backend for the CPU; the interpreter does the work."""

    @staticmethod
    def is_active() -> bool:
        return True


def _register(backends):
    backends.backends["cpu"] = types.SimpleNamespace(driver=_Driver, compiler=None)


class _BackendsLoader(importlib.abc.Loader):
    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register(module)


class _BackendsFinder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname != "triton.backends":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _BackendsLoader(spec.loader)
        return spec


def install():
    """Set the environment up and arrange that Triton, once imported, has the backend. Idempotent."""
    os.environ.update(ENVIRONMENT)
    module = sys.modules.get("triton.backends")
    if module is not None:
        _register(module)
    elif not any(isinstance(finder, _BackendsFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BackendsFinder())


ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # Two threads on a toy model spend their time on handing work over.
    "OMP_NUM_THREADS": "1",
}

if os.environ.get("SINKPRUNE_VLLM_ON_CPU") == "1":
    install()
