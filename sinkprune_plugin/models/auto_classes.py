"""Registration of the native models with transformers' auto classes.

Each function must be called after the auto class that it extends has been imported.
"""

import sys

from sinkprune_plugin.models.catalogue import NATIVE_MODELS, NativeModel, list_native_model

__all__ = ["add_native_model", "register_configs", "register_imported", "register_models", "register_tokenizers"]


def add_native_model(native: NativeModel) -> None:
    """Make everything here know a model of another package, as if it were in the catalogue.

    To be called in each process that uses it; for vLLM from an entry point in its group ``vllm.general_plugins``.

    :param native: the row
    :raises UsageError: if there is a model of its type or architecture
    """
    list_native_model(native)
    if "transformers.models.auto.configuration_auto" in sys.modules:
        register_configs()
    for name in sorted(_registered):
        _REGISTER[name]()


def register_configs() -> None:
    """Make ``AutoConfig`` know the model types of the catalogue. Idempotent."""
    from transformers.models.auto.configuration_auto import AutoConfig

    for native in NATIVE_MODELS:
        AutoConfig.register(native.model_type, native.config_class(), exist_ok=True)


def register_models() -> None:
    """Make ``AutoModel``, ``AutoModelForCausalLM`` and ``AutoModelForMaskedLM`` know the models. Idempotent.

    All three give the class with its vocabulary projection: that is what the official ``auto_map`` entries for
    ``AutoModel`` mean, llm-compressor loads through the second, and the third is what the models are.
    """
    from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    register_configs()
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
        for native in NATIVE_MODELS:
            auto_class.register(native.config_class(), native.model_class(), exist_ok=True)


def register_tokenizers() -> None:
    """Make ``AutoTokenizer`` know the tokenizers of the catalogue. Idempotent."""
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    register_configs()
    for native in NATIVE_MODELS:
        tokenizer_class = native.tokenizer_class()
        if tokenizer_class is not None:
            AutoTokenizer.register(native.config_class(), tokenizer_class=tokenizer_class, exist_ok=True)


_REGISTER = {
    "transformers.models.auto.modeling_auto": register_models,
    "transformers.models.auto.tokenization_auto": register_tokenizers,
}
_registered: set[str] = set()


def register_imported() -> None:
    """Register with those auto classes that have been imported by now; each configuration calls this when it is made.

    A hook on the import of ``modeling_auto`` comes too late where that import is what imports torch, as in a script
    that begins with ``from transformers import AutoModelForCausalLM``. But every auto class makes the configuration
    before it looks for the class that goes with it, so this is always in time.
    """
    for name, register in _REGISTER.items():
        module = sys.modules.get(name)
        if name in _registered or module is None or getattr(module.__spec__, "_initializing", False):
            continue
        register()
        _registered.add(name)
