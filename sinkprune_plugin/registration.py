"""Every entry point and registry in one place.

``arm()`` is the function behind the ``torch.backends`` entry point, which torch calls at the end of ``import torch`` in
every process. It imports nothing but the standard library and only arranges that registration follows when one of the
host libraries is imported. It may be called any number of times.

- ``llmcompressor.modifiers.factory``: its registry of registered modifiers becomes a mapping that resolves the entry
  points of the group ``llmcompressor.modifiers`` at the first lookup. Registering at import time would be circular:
  ``llmcompressor`` is half imported when it imports torch.
- ``transformers``: configurations are registered as soon as ``AutoConfig`` exists, and register their models when they
  are made, which comes before an auto class looks for the model.
- ``lm_eval.models``: the model class becomes known under the name ``sinkprune``.
- ``triton.backends``: gets a backend for the CPU in the processes of a vLLM that runs on one (``vllm/cpu.py``).
"""

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["CPU_SWITCH", "MODIFIER_GROUP", "arm"]

MODIFIER_GROUP = "llmcompressor.modifiers"
# Set to 1 in the processes of a vLLM that runs on a CPU (vllm/cpu.py).
CPU_SWITCH = "SINKPRUNE_VLLM_ON_CPU"


class _SelfFillingRegistry(dict[str, Any]):
    """The factory's name → class mapping, which loads the entry points when it is first asked."""

    def __init__(self, existing: dict[str, Any]) -> None:
        super().__init__(existing)
        self._filled = False

    def fill(self) -> None:
        """Resolve every entry point of the group; a broken one is reported and skipped."""
        if self._filled:
            return
        self._filled = True
        from importlib.metadata import entry_points

        for entry in entry_points(group=MODIFIER_GROUP):
            if dict.__contains__(self, entry.name):
                continue
            try:
                self[entry.name] = entry.load()
            except Exception as error:  # noqa: BLE001 - another package's entry point must not break every recipe
                from loguru import logger

                logger.warning(f"modifier {entry.name} ({entry.value}) could not be loaded: {error}")

    def __contains__(self, key: object) -> bool:
        self.fill()
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.fill()
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.fill()
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        self.fill()
        return super().__iter__()


def _fill_factory(module: ModuleType) -> None:
    factory = module.ModifierFactory
    if not isinstance(factory._registered_registry, _SelfFillingRegistry):
        factory._registered_registry = _SelfFillingRegistry(factory._registered_registry)


def _register_configs(_module: ModuleType) -> None:
    importlib.import_module("sinkprune_plugin.models").register_configs()


def _register_quantizers(_module: ModuleType) -> None:
    importlib.import_module("sinkprune_plugin.transformers.quantizer").register_quantizers()


def _admit_sparse_models(module: ModuleType) -> None:
    importlib.import_module("sinkprune_plugin.modifiers.oneshot_admission").admit_sparse_models(module)


def _correct_saved_config(module: ModuleType) -> None:
    importlib.import_module("sinkprune_plugin.modifiers.oneshot_admission").correct_saved_config(module)


def _register_lm_eval(_module: ModuleType) -> None:
    registry = importlib.import_module("lm_eval.api.registry").model_registry
    if "sinkprune" not in registry:
        registry.register("sinkprune", target="sinkprune_plugin.lm_eval.lm_eval_model:SinkpruneLM")


def _add_cpu_backend(module: ModuleType) -> None:
    if os.environ.get(CPU_SWITCH) == "1":
        importlib.import_module("sinkprune_plugin.vllm.cpu").add_backend(module)


_ON_IMPORT: dict[str, Callable[[ModuleType], None]] = {
    "llmcompressor.modifiers.factory": _fill_factory,
    "transformers.models.auto.configuration_auto": _register_configs,
    # The second one for a process whose first import of torch happens within the first one.
    "transformers.quantizers.auto": _register_quantizers,
    "transformers.modeling_utils": _register_quantizers,
    "llmcompressor.entrypoints.oneshot": _admit_sparse_models,
    "llmcompressor.transformers.compression.compressed_tensors_utils": _correct_saved_config,
    "lm_eval.models": _register_lm_eval,
    "triton.backends": _add_cpu_backend,
}


def _act(module: ModuleType, action: Callable[[ModuleType], None]) -> None:
    try:
        action(module)
    except Exception as error:  # noqa: BLE001 - importing transformers must work whatever happens to us
        warnings.warn(f"sinkprune_plugin could not register itself with {module.__name__}: {error}", stacklevel=2)


class _NotifyingLoader(Loader):
    """Runs the real loader, then the registration that waited for this module."""

    def __init__(self, loader: Loader, action: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._action = action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Hand the module back to its own loader: tools that look at __loader__ see what they expect.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _act(module, self._action)


class _ImportWatcher(MetaPathFinder):
    """Finds the watched modules through the finders that follow it and wraps their loaders."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        action = _ON_IMPORT.get(fullname)
        if action is None:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _ImportWatcher) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _NotifyingLoader(spec.loader, action)
                return spec
        return None


def arm() -> None:
    """Arrange that the package's classes are registered when llm-compressor or transformers is imported.

    Idempotent and lazy; if a host library is imported already, registration happens immediately.
    """
    if not any(isinstance(finder, _ImportWatcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ImportWatcher())
    if os.environ.get(CPU_SWITCH) == "1":
        importlib.import_module("sinkprune_plugin.vllm.cpu").find_metadata()
    for name, action in _ON_IMPORT.items():
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            _act(module, action)
