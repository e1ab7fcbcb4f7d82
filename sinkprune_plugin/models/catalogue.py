"""The one list of native models, for all code that registers, corrupts, serves, prunes or names them.

It holds facts and names, and imports the classes only when asked: registration begins within ``import torch``, when no
class can be imported yet.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.diffusion_family import DiffusionFamily

__all__ = [
    "ARCHITECTURES",
    "MISSING",
    "NATIVE_MODELS",
    "Experts",
    "NativeModel",
    "Units",
    "list_native_model",
    "missing_reason",
    "native_model",
]


@dataclass(frozen=True)
class Units:
    """What can be removed from a decoder block, as names of Linears within the block.

    A channel of the gated MLP is a row of each of ``channel_rows`` and a column of ``channel_columns``. A query head is
    ``head_dim`` rows of ``head_rows`` and columns of ``head_columns``; a key and value head as many rows of each of
    ``key_value_rows``. Elements of their biases go with the rows. Query head h reads key and value head
    ⌊h · key_value_heads / attention_heads⌋.

    Where one Linear is named as ``head_rows`` and twice as ``key_value_rows``, it has the queries' rows first, then the
    keys', then the values'. In a block with routed experts ``shared_rows`` and ``shared_columns`` are what
    ``channel_rows`` and ``channel_columns`` are elsewhere: those of the expert that all tokens go to. Where channels of
    routed experts are, :class:`Experts` says.
    """

    channel_rows: tuple[str, ...]
    channel_columns: str
    head_rows: str
    key_value_rows: tuple[str, ...]
    head_columns: str
    shared_rows: tuple[str, ...] = ()
    shared_columns: str | None = None


@dataclass(frozen=True)
class Experts:
    """Where a decoder block's experts are, as names of modules and tensors within the block.

    Block and module names hold for the checkpoint's tensors as well: expert N's are ``{experts}.N.{gate}.weight`` and
    so on. What belongs to one expert besides is a row of each of ``rows``.

    :param experts: name of the list of experts
    :param router: name of the :class:`~sinkprune_plugin.models.experts.Router`
    :param rows: names of tensors with one row or element for each expert
    :param gate: name of a Linear within an expert, as ``up`` and ``down``: down(act(gate x) ⊙ up x)
    """

    experts: str = "mlp.experts"
    router: str = "mlp.gate"
    rows: tuple[str, ...] = ("mlp.gate.weight",)
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True)
class NativeModel:
    """One ``model_type`` and the classes that go with it.

    Places are ``module:class``, the module within a folder of this package or, where ``package`` is given, within that;
    ``:class`` is the package itself.

    :param model_type: as in config.json
    :param family: how it is corrupted, and what its attention sees
    :param models: names of published models, for the documentation
    :param config: place of the configuration, within this folder
    :param model: place of the class with the vocabulary projection, within this folder
    :param architectures: names of the model's class in config.json; all mean the same class
    :param vllm_model: place of the vLLM class, within the folder of vLLM models; None: vLLM doesn't serve it
    :param tokenizer: place of the tokenizer within this folder, if those of transformers can't read the official files
    :param units: what can be removed from its decoder blocks; None: nothing, and structured pruning refuses the model
    :param experts: where its experts are; None: it has none
    :param package: importable package with the classes, for a family that isn't this package's
    """

    model_type: str
    family: DiffusionFamily
    models: str
    config: str
    model: str
    architectures: tuple[str, ...]
    vllm_model: str | None
    tokenizer: str | None = None
    units: Units | None = None
    experts: Experts | None = None
    package: str | None = None

    def config_class(self) -> Any:
        """Import the configuration's class."""
        return self._resolve(self.config)

    def model_class(self) -> Any:
        """Import the model's class."""
        return self._resolve(self.model)

    def tokenizer_class(self) -> Any:
        """Import the tokenizer's class; None where transformers' own works."""
        return None if self.tokenizer is None else self._resolve(self.tokenizer)

    def vllm_place(self) -> str | None:
        """The vLLM class, as vLLM's registry takes it: ``full.module:class``."""
        return None if self.vllm_model is None else self._full(self.vllm_model, "sinkprune_plugin.vllm.architectures")

    def _resolve(self, place: str) -> Any:
        module, _, name = self._full(place, "sinkprune_plugin.models").partition(":")
        return getattr(import_module(module), name)

    def _full(self, place: str, folder: str) -> str:
        module, _, name = place.partition(":")
        return f"{self.package or folder}{'.' if module else ''}{module}:{name}"


_LLADA_UNITS = Units(
    channel_rows=("ff_proj", "up_proj"),
    channel_columns="ff_out",
    head_rows="q_proj",
    key_value_rows=("k_proj", "v_proj"),
    head_columns="attn_out",
)
_QWEN_UNITS = Units(
    channel_rows=("mlp.gate_proj", "mlp.up_proj"),
    channel_columns="mlp.down_proj",
    head_rows="self_attn.q_proj",
    key_value_rows=("self_attn.k_proj", "self_attn.v_proj"),
    head_columns="self_attn.o_proj",
)

_LLADA2_UNITS = Units(
    channel_rows=("mlp.gate_proj", "mlp.up_proj"),
    channel_columns="mlp.down_proj",
    head_rows="attention.query_key_value",
    key_value_rows=("attention.query_key_value", "attention.query_key_value"),
    head_columns="attention.dense",
    shared_rows=("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    shared_columns="mlp.shared_experts.down_proj",
)

_LLADA = DiffusionFamily("llada", ("llada", "mmada"), default_mask_token_id=126336)
# LLaDA-MoE's official files say model_type "llada" too, but their vocabulary and mask token are others: 156895 as in
# inclusionAI/dInfer and in the sampling code of the model card.
_LLADA_MOE = DiffusionFamily(
    "llada-moe", ("lladamoe",), default_mask_token_id=156895, shared_types=("llada",), marks=("num_experts",)
)
_DREAM = DiffusionFamily(
    "dream", ("Dream",), keep_first=True, keep_last=True, logit_shift=1, default_mask_token_id=151666
)
_LLADA2 = DiffusionFamily(
    "llada2",
    ("llada2_moe",),
    default_mask_token_id=156895,
    context="block_causal",
    # Not in official files: there the caller of the sampler gives it, 32 in all published examples.
    block_key="block_length",
)
_NEMOTRON_LABS = DiffusionFamily(
    "nemotron_labs",
    ("nemotron_labs_diffusion",),
    default_mask_token_id=100,
    context="causal",
    block_key="block_size",
)
_SDAR = DiffusionFamily(
    "sdar",
    ("sdar",),
    # As in the checkpoints' config.json and in the engines that serve them.
    default_mask_token_id=151669,
    context="block_causal",
    block_key="block_size",
    default_block_length=4,
)

NATIVE_MODELS = [
    NativeModel(
        model_type="llada",
        family=_LLADA,
        models="LLaDA, LLaDA-1.5",
        config="llada.configuration_llada:LLaDAConfig",
        model="llada.modeling_llada:LLaDAModelLM",
        architectures=("LLaDAModelLM",),
        vllm_model="llada:LLaDAModelLM",
        units=_LLADA_UNITS,
    ),
    NativeModel(
        # The LLaDA network with image tokens appended to the vocabulary; the mask token keeps its id. Text corruption
        # never produces an image token.
        model_type="mmada",
        family=_LLADA,
        models="MMaDA (text)",
        config="llada.configuration_llada:MMaDAConfig",
        model="llada.modeling_llada:MMaDAModelLM",
        # The spelling of the official checkpoints, and that of the class which transformers writes.
        architectures=("MMadaModelLM", "MMaDAModelLM"),
        vllm_model="llada:MMaDAModelLM",
        units=_LLADA_UNITS,
    ),
    NativeModel(
        # Official files say "llada" (LLaDAConfig hands them on), those that name the type say this.
        model_type="lladamoe",
        family=_LLADA_MOE,
        models="LLaDA-MoE",
        config="llada_moe.configuration_llada_moe:LLaDAMoEConfig",
        model="llada_moe.modeling_llada_moe:LLaDAMoEModelLM",
        # The last one is dInfer's name for a checkpoint whose experts it has fused.
        architectures=("LLaDAMoEModelLM", "LLaDAMoEModel", "FusedLLaDAMoEModelLM"),
        vllm_model="llada_moe:LLaDAMoEModelLM",
        units=_QWEN_UNITS,
        experts=Experts(),
    ),
    NativeModel(
        model_type="llada2_moe",
        family=_LLADA2,
        models="LLaDA2.0 and 2.1 mini and flash",
        config="llada2_moe.configuration_llada2_moe:LLaDA2MoeConfig",
        model="llada2_moe.modeling_llada2_moe:LLaDA2MoeModelLM",
        architectures=("LLaDA2MoeModelLM",),
        vllm_model="llada2_moe:LLaDA2MoeModelLM",
        units=_LLADA2_UNITS,
        experts=Experts(rows=("mlp.gate.weight", "mlp.gate.expert_bias")),
    ),
    NativeModel(
        model_type="Dream",
        family=_DREAM,
        models="Dream, DiffuCoder",
        config="dream.configuration_dream:DreamConfig",
        model="dream.modeling_dream:DreamModel",
        architectures=("DreamModel",),
        vllm_model="dream:DreamModel",
        # The official files name a Python file; LLaDA's tokenizer.json is complete.
        tokenizer="dream.tokenization_dream:DreamTokenizer",
        units=_QWEN_UNITS,
    ),
    NativeModel(
        model_type="nemotron_labs_diffusion",
        family=_NEMOTRON_LABS,
        models="Nemotron-Labs-Diffusion 3B, 8B, 14B",
        config="nemotron_labs.configuration_nemotron_labs:NemotronLabsDiffusionConfig",
        model="nemotron_labs.modeling_nemotron_labs:NemotronLabsDiffusionModel",
        architectures=("NemotronLabsDiffusionModel",),
        vllm_model="nemotron_labs:NemotronLabsDiffusionModel",
        units=_QWEN_UNITS,
    ),
    NativeModel(
        model_type="sdar",
        family=_SDAR,
        models="SDAR 1.7B, 4B, 8B",
        config="sdar.configuration_sdar:SDARConfig",
        model="sdar.modeling_sdar:SDARForCausalLM",
        architectures=("SDARForCausalLM",),
        vllm_model="sdar:SDARForCausalLM",
        units=_QWEN_UNITS,
    ),
]


def native_model(config: Any) -> NativeModel | None:
    """The row of a model.

    :param config: a model's configuration, or anything
    :return: the row of its ``model_type``; None if there is none
    """
    model_type = getattr(config, "model_type", None)
    return next((native for native in NATIVE_MODELS if native.model_type == model_type), None)


ARCHITECTURES: dict[str, str] = {}
"""Class name in config.json → the vLLM class, as in :meth:`NativeModel.vllm_place`."""

MISSING = {
    "sdar_moe": "SDAR-MoE's experts have no class here; use a dense SDAR, or LLaDA2, a mixture of experts that "
    "denoises blocks in the same way",
    "diffusion_gemma": "DiffusionGemma replaces tokens by random ones instead of a mask token, for which there is no "
    "likelihood, sampler or trajectory here, and its experts are one tensor per layer; use LLaDA2 or "
    "Nemotron-Labs-Diffusion",
}
"""``model_type`` of models that people ask for → what is missing for them."""


def missing_reason(model_type: Any) -> str | None:
    """What is missing for a model that people ask for.

    :param model_type: as in config.json, or anything
    :return: the type and the reason, for an error; None for a model that is supported, or that nobody asked for
    """
    for kind, reason in MISSING.items():
        if isinstance(model_type, str) and model_type.casefold().startswith(kind):
            return f"model_type {model_type!r} isn't supported: {reason}"
    return None


def _list_architectures(native: NativeModel) -> None:
    place = native.vllm_place()
    if place is not None:
        ARCHITECTURES.update(dict.fromkeys(native.architectures, place))


for _native in NATIVE_MODELS:
    _list_architectures(_native)


def list_native_model(native: NativeModel) -> None:
    """Add a row to the list while the program runs; see ``sinkprune_plugin.models.add_native_model``.

    :param native: the row
    :raises UsageError: if there is a model of its type or architecture
    """
    for other in NATIVE_MODELS:
        same = {native.model_type} & {other.model_type} or set(native.architectures) & set(other.architectures)
        if same:
            raise UsageError(
                f"{sorted(same)[0]!r} is in the catalogue already, for {other.models}; choose another name"
            )
    NATIVE_MODELS.append(native)
    _list_architectures(native)
