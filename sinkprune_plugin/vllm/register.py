"""Entry point of the group ``vllm.general_plugins``: vLLM calls it in its front end, its engine and each worker."""

import importlib.util

__all__ = ["TESTED_FIRST", "TESTED_UNTIL", "register"]

# The scheduler and the model state depend on interfaces that vLLM may change in any release.
TESTED_FIRST, TESTED_UNTIL = (0, 32), (0, 33)


def register() -> None:
    """Make vLLM know the models, their configurations and the sparse formats. Idempotent; nothing without vLLM."""
    if importlib.util.find_spec("vllm") is None:
        return
    from sinkprune_plugin.vllm.config_hook import register_config_hooks
    from sinkprune_plugin.vllm.sparse_quantization import register_sparse

    check_version()
    register_configs()
    register_models()
    register_config_hooks()
    register_sparse()


def check_version() -> None:
    """Warn once in each process if vLLM isn't one of the tested versions."""
    import vllm
    from vllm.logger import init_logger

    version = vllm.__version__
    if not is_tested(version):
        first, until = (".".join(map(str, bound)) for bound in (TESTED_FIRST, TESTED_UNTIL))
        # A logger below vLLM's own, which is the only one that is configured in its processes.
        init_logger("vllm.sinkprune").warning_once(
            "sinkprune-plugin was tested with vLLM from %s up to but not including %s; this is %s. Install one of "
            "those if serving fails.",
            first,
            until,
            version,
        )


def is_tested(version: str) -> bool:
    """Whether a version of vLLM is in the tested range.

    :param version: such as ``0.32.1`` or ``0.32.0+cpu``
    """
    numbers = version.split("+")[0].split(".")[:2]
    if not all(number.isdigit() for number in numbers):
        return False
    return TESTED_FIRST <= tuple(map(int, numbers)) < TESTED_UNTIL


def register_configs() -> None:
    """Make vLLM load our configurations natively, whatever Python files a checkpoint names."""
    from vllm.transformers_utils import config as vllm_configs

    from sinkprune_plugin.models import register_configs as register_with_transformers
    from sinkprune_plugin.models.catalogue import NATIVE_MODELS
    from sinkprune_plugin.vllm.config_hook import DEFAULT_CANVAS

    register_with_transformers()
    for native in NATIVE_MODELS:
        config_class = native.config_class()
        vllm_configs._CONFIG_REGISTRY[native.model_type] = config_class
        # How vLLM recognises diffusion models. On the class, so that it isn't written to any config.json.
        config_class.canvas_length = DEFAULT_CANVAS


def register_models() -> None:
    """Make vLLM know the models, by name: importing them now might initialise CUDA before a fork."""
    from vllm import ModelRegistry

    from sinkprune_plugin.models.catalogue import ARCHITECTURES

    for architecture, place in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, place)
