"""Native transformers classes for diffusion LMs whose checkpoints otherwise carry Python code.

Module names equal the tensors' names in the official checkpoints, so weights load as they are, and nothing from a
checkpoint is executed: transformers prefers classes registered from outside of it over a checkpoint's Python files.
Importing this package imports neither torch nor transformers; the registration functions are to be called when the auto
classes they extend have been imported.
"""

import sys

__all__ = ["register_configs", "register_imported", "register_models", "register_tokenizers"]


def register_configs() -> None:
    """Make ``AutoConfig`` know the model types ``llada``, ``mmada`` and ``Dream``. Idempotent."""
    from transformers.models.auto.configuration_auto import AutoConfig

    from sinkprune_plugin.models.dream.configuration_dream import DreamConfig
    from sinkprune_plugin.models.llada.configuration_llada import LLaDAConfig, MMaDAConfig

    for config_class in (LLaDAConfig, MMaDAConfig, DreamConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def register_models() -> None:
    """Make ``AutoModel``, ``AutoModelForCausalLM`` and ``AutoModelForMaskedLM`` know the models. Idempotent.

    All three give the class with its vocabulary projection: that is what the official ``auto_map`` entries for
    ``AutoModel`` mean, llm-compressor loads through the second, and the third is what the models are.
    """
    from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    from sinkprune_plugin.models.dream.modeling_dream import DreamModel
    from sinkprune_plugin.models.llada.modeling_llada import LLaDAModelLM, MMaDAModelLM

    register_configs()
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
        for model_class in (LLaDAModelLM, MMaDAModelLM, DreamModel):
            auto_class.register(model_class.config_class, model_class, exist_ok=True)


def register_tokenizers() -> None:
    """Make ``AutoTokenizer`` know Dream's tokenizer, whose official files name a Python file. Idempotent.

    LLaDA's tokenizers need nothing: their ``tokenizer.json`` is complete.
    """
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    from sinkprune_plugin.models.dream.configuration_dream import DreamConfig
    from sinkprune_plugin.models.dream.tokenization_dream import DreamTokenizer

    register_configs()
    AutoTokenizer.register(DreamConfig, tokenizer_class=DreamTokenizer, exist_ok=True)


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
