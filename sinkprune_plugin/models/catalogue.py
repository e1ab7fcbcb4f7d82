"""The one list of native models, for all code that registers, serves or names them.

It holds names, and imports the objects only when asked: registration begins within ``import torch``, when no
class can be imported yet.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

__all__ = ["ARCHITECTURES", "NATIVE_MODELS", "NativeModel", "Units"]


@dataclass(frozen=True)
class Units:
    """What can be removed from a decoder block, as names of Linears within the block.

    A channel of the gated MLP is a row of each of ``channel_rows`` and a column of ``channel_columns``. A query head is
    ``head_dim`` rows of ``head_rows`` and columns of ``head_columns``; a key and value head as many rows of each of
    ``key_value_rows``. Elements of their biases go with the rows. Query head h reads key and value head
    ⌊h · key_value_heads / attention_heads⌋.
    """

    channel_rows: tuple[str, ...]
    channel_columns: str
    head_rows: str
    key_value_rows: tuple[str, ...]
    head_columns: str


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
    :param units: what can be removed from its decoder blocks; None: nothing, and structured pruning refuses the model
    """

    model_type: str
    family: str
    config: str
    model: str
    architectures: tuple[str, ...]
    vllm_model: str
    tokenizer: str | None = None
    units: Units | None = None

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


_LLADA_UNITS = Units(
    channel_rows=("ff_proj", "up_proj"),
    channel_columns="ff_out",
    head_rows="q_proj",
    key_value_rows=("k_proj", "v_proj"),
    head_columns="attn_out",
)
_DREAM_UNITS = Units(
    channel_rows=("mlp.gate_proj", "mlp.up_proj"),
    channel_columns="mlp.down_proj",
    head_rows="self_attn.q_proj",
    key_value_rows=("self_attn.k_proj", "self_attn.v_proj"),
    head_columns="self_attn.o_proj",
)

NATIVE_MODELS = (
    NativeModel(
        model_type="llada",
        family="llada",
        config="llada.configuration_llada:LLaDAConfig",
        model="llada.modeling_llada:LLaDAModelLM",
        architectures=("LLaDAModelLM",),
        vllm_model="llada:LLaDAModelLM",
        units=_LLADA_UNITS,
    ),
    NativeModel(
        model_type="mmada",
        family="llada",
        config="llada.configuration_llada:MMaDAConfig",
        model="llada.modeling_llada:MMaDAModelLM",
        # The spelling of the official checkpoints, and that of the class which transformers writes.
        architectures=("MMadaModelLM", "MMaDAModelLM"),
        vllm_model="llada:MMaDAModelLM",
        units=_LLADA_UNITS,
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
        units=_DREAM_UNITS,
    ),
)

ARCHITECTURES = {name: native.vllm_model for native in NATIVE_MODELS for name in native.architectures}
"""Class name in config.json → place of the vLLM class, as in :attr:`NativeModel.vllm_model`."""
