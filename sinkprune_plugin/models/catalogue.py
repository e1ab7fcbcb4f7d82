"""The one list of native models, for all code that registers, serves or names them.

It holds names, and imports the objects only when asked: registration begins within ``import torch``, when no
class can be imported yet.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

__all__ = ["ARCHITECTURES", "NATIVE_MODELS", "NativeModel"]


@dataclass(frozen=True)
class NativeModel:
    """One ``model_type`` and the classes that go with it. Places are ``module:class``.

    :param model_type: as in config.json
    :param family: name of its :class:`~sinkprune_plugin.diffusion.DiffusionFamily`
    :param config: place of the configuration, within this folder
    :param model: place of the class with the vocabulary projection, within this folder
    :param architectures: names of the model's class in config.json; all mean the same class
    :param vllm_model: place of the vLLM class, within the folder of vLLM models
    :param tokenizer: place of the tokenizer within this folder, if those of transformers can't read the official files
    """

    model_type: str
    family: str
    config: str
    model: str
    architectures: tuple[str, ...]
    vllm_model: str
    tokenizer: str | None = None

    def config_class(self) -> Any:
        """Import the configuration's class."""
        return _resolve(self.config)

    def model_class(self) -> Any:
        """Import the model's class."""
        return _resolve(self.model)

    def tokenizer_class(self) -> Any:
        """Import the tokenizer's class; None where transformers' own works."""
        return None if self.tokenizer is None else _resolve(self.tokenizer)


def _resolve(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(f"sinkprune_plugin.models.{module}"), name)


NATIVE_MODELS = (
    NativeModel(
        model_type="llada",
        family="llada",
        config="llada.configuration_llada:LLaDAConfig",
        model="llada.modeling_llada:LLaDAModelLM",
        architectures=("LLaDAModelLM",),
        vllm_model="llada:LLaDAModelLM",
    ),
    NativeModel(
        model_type="mmada",
        family="llada",
        config="llada.configuration_llada:MMaDAConfig",
        model="llada.modeling_llada:MMaDAModelLM",
        # The spelling of the official checkpoints, and that of the class which transformers writes.
        architectures=("MMadaModelLM", "MMaDAModelLM"),
        vllm_model="llada:MMaDAModelLM",
    ),
    NativeModel(
        model_type="Dream",
        family="dream",
        config="dream.configuration_dream:DreamConfig",
        model="dream.modeling_dream:DreamModel",
        architectures=("DreamModel",),
        vllm_model="dream:DreamModel",
        # The official files name a Python file; LLaDA's tokenizer.json is complete.
        tokenizer="dream.tokenization_dream:DreamTokenizer",
    ),
)

ARCHITECTURES = {name: native.vllm_model for native in NATIVE_MODELS for name in native.architectures}
"""Class name in config.json → place of the vLLM class, as in :attr:`NativeModel.vllm_model`."""
