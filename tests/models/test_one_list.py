"""A family of another package, in this one file: its classes, and one row for the catalogue."""

import pytest
import torch

from sinkprune_plugin.diffusion import elbo_perplexity, find_family, resolve_diffusion
from sinkprune_plugin.diffusion.families import _FAMILIES
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.inspection.info import inspect_checkpoint
from sinkprune_plugin.loading import load_model
from sinkprune_plugin.models import add_native_model
from sinkprune_plugin.models.block_sizes import keep_units
from sinkprune_plugin.models.catalogue import ARCHITECTURES, NATIVE_MODELS, NativeModel, Units
from sinkprune_plugin.models.decoder_blocks import block_linears
from sinkprune_plugin.models.diffusion_family import DiffusionFamily
from sinkprune_plugin.models.nemotron_labs.configuration_nemotron_labs import NemotronLabsDiffusionConfig
from sinkprune_plugin.models.nemotron_labs.modeling_nemotron_labs import NemotronLabsDiffusionModel
from sinkprune_plugin.sampling import denoise


class ToyConfig(NemotronLabsDiffusionConfig):
    model_type = "toy_dlm"


class ToyModel(NemotronLabsDiffusionModel):
    config_class = ToyConfig


TOY = NativeModel(
    model_type="toy_dlm",
    family=DiffusionFamily("toy", ("toy_dlm",), default_mask_token_id=5, context="causal", block_key="block_size"),
    models="Toy",
    package=__name__,
    config=":ToyConfig",
    model=":ToyModel",
    architectures=("ToyModel",),
    vllm_model=":ToyForVLLM",
    units=Units(
        channel_rows=("mlp.gate_proj", "mlp.up_proj"),
        channel_columns="mlp.down_proj",
        head_rows="self_attn.q_proj",
        key_value_rows=("self_attn.k_proj", "self_attn.v_proj"),
        head_columns="self_attn.o_proj",
    ),
)


@pytest.fixture
def _added():
    before = list(NATIVE_MODELS), dict(ARCHITECTURES), dict(_FAMILIES)
    add_native_model(TOY)
    yield
    NATIVE_MODELS[:] = before[0]
    for registry, content in ((ARCHITECTURES, before[1]), (_FAMILIES, before[2])):
        registry.clear()
        registry.update(content)


@pytest.mark.usefixtures("_added")
def test_one_row_makes_everything_know_it(tmp_path):
    sizes = {"hidden_size": 16, "head_dim": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    ToyModel(ToyConfig(**sizes, vocab_size=40, intermediate_size=24, block_size=4)).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert type(model) is ToyModel
    spec = resolve_diffusion(model.config)
    assert (spec.name, spec.mask_token_id, spec.block_length, spec.context) == ("toy", 5, 4, "causal")
    windows = torch.randint(6, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    assert 1 < elbo_perplexity(model, windows, num_samples=2).perplexity < 1000
    assert len(denoise(model, windows[0, :3], gen_length=8).sequences[0]) == 8
    assert inspect_checkpoint(tmp_path).family == "toy"
    keep_units(model, 0, channels=torch.arange(8))
    assert block_linears(model)["encoder.layers.0.mlp.up_proj"].weight.shape == (8, 16)
    # What vLLM's registry is told.
    assert ARCHITECTURES["ToyModel"] == f"{__name__}:ToyForVLLM"


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(UsageError, match="'llada' is in the catalogue already"):
        add_native_model(NativeModel(**{**vars(TOY), "model_type": "llada"}))
    with pytest.raises(UsageError, match="'DreamModel' is in the catalogue already, for Dream"):
        add_native_model(NativeModel(**{**vars(TOY), "architectures": ("DreamModel",)}))
    assert find_family({"model_type": "toy_dlm"}) is None
