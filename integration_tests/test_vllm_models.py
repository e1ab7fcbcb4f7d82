"""The vLLM modules compute what the transformers classes compute, from the same checkpoints."""

import json

import pytest
import torch
from nemotron_labs_checkpoints import write_nemotron_labs
from official_checkpoints import write_dream, write_llada
from safetensors.torch import load_file, save_file
from sdar_checkpoints import write_sdar
from unequal_blocks import write_unequal_dream, write_unequal_llada
from vllm_engine import prepare_vllm
from vllm_modules import forward_function, loader, tokens_of

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.dream.modeling_dream import DreamModel
from sinkprune_plugin.models.llada.configuration_llada import LLaDAConfig
from sinkprune_plugin.models.llada.modeling_llada import LLaDAModelLM
from sinkprune_plugin.models.nemotron_labs.modeling_nemotron_labs import NemotronLabsDiffusionModel
from sinkprune_plugin.models.rotary import RotaryTables, apply_rotary
from sinkprune_plugin.models.sdar.modeling_sdar import SDARForCausalLM


@pytest.fixture(scope="module")
def load():
    with loader() as load:
        yield load


@pytest.fixture
def logits(monkeypatch):
    return forward_function(monkeypatch)


def check_same_logits(native_class, folder, config, load, logits):
    tokens = tokens_of(config)
    with torch.no_grad():
        expected = native_class.from_pretrained(folder, dtype=torch.float32)(tokens[None]).logits[0]
    found = logits(*load(folder), tokens)
    # float32 sums in another order (fused projections, another attention kernel); the logits are of order 1.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.abs().max() > 0.5
    return found


def test_registering_again_changes_nothing(tmp_path):
    prepare_vllm()
    from vllm.model_executor.layers import quantization
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from sinkprune_plugin.vllm.register import register

    register()
    loading, methods = DefaultModelLoader.get_all_weights, list(quantization.QUANTIZATION_METHODS)
    register()
    assert DefaultModelLoader.get_all_weights is loading
    assert methods == quantization.QUANTIZATION_METHODS
    # What vLLM needs on the class isn't written to the files.
    config = LLaDAConfig()
    assert config.canvas_length
    config.save_pretrained(tmp_path)
    assert "canvas_length" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("version", "tested"),
    [("0.32.0", True), ("0.32.1", True), ("0.32.0+cpu", True), ("0.33.0", False), ("0.31.2", False), ("1.32.0", False),
     ("0.32rc1", False), ("dev", False)],
)  # fmt: skip
def test_versions_of_vllm_that_were_tested(version, tested):
    from sinkprune_plugin.vllm.register import is_tested

    assert is_tested(version) is tested


LLADAS = {
    "official": {},
    "grouped queries": {"n_kv_heads": 2},
    "biases": {"include_bias": True, "bias_for_layer_norm": True},
    "QKV biases": {"include_qkv_bias": True},
    "norms without weights": {"layer_norm_with_affine": False},
    "tied": {"weight_tying": True},
    "tied with biases": {"weight_tying": True, "include_bias": True},
    "gelu": {"activation_type": "gelu"},
    "relu": {"activation_type": "relu"},
    "no padded rows": {"embedding_size": 90},
    "rotated in the model's dtype": {"rope_full_precision": False},
}


@pytest.mark.parametrize("name", LLADAS)
def test_llada_gives_the_logits_of_the_plain_model(name, tmp_path, load, logits):
    config, _ = write_llada(tmp_path, **LLADAS[name])
    found = check_same_logits(LLaDAModelLM, tmp_path, config, load, logits)
    # Padded rows of the embedding are valid tokens.
    assert found.shape[1] == config["embedding_size"]


@pytest.mark.parametrize("architecture", ["MMadaModelLM", "MMaDAModelLM"])
def test_mmada_gives_the_logits_of_the_plain_model(architecture, tmp_path, load, logits):
    config, _ = write_llada(tmp_path, model_type="mmada", architectures=[architecture])
    check_same_logits(LLaDAModelLM, tmp_path, config, load, logits)


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 7}, {"tie_word_embeddings": True}, {"hidden_act": "gelu_pytorch_tanh"},
     {"hidden_act": "relu2"}],
    ids=["official", "all heads", "tied", "gelu", "an activation without kernel"],
)  # fmt: skip
def test_dream_gives_the_logits_of_the_plain_model(changes, tmp_path, load, logits):
    config, _ = write_dream(tmp_path, **changes)
    check_same_logits(DreamModel, tmp_path, config, load, logits)


@pytest.mark.parametrize(
    "changes",
    [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True},
     {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}],
    ids=["official", "biases", "tied", "plain rotary"],
)  # fmt: skip
def test_nemotron_labs_gives_the_logits_of_the_plain_model(changes, tmp_path, load, logits):
    # The harness's attention looks in both directions, as in one open block.
    config, _ = write_nemotron_labs(tmp_path, block_size=64, **changes)
    check_same_logits(NemotronLabsDiffusionModel, tmp_path, config, load, logits)


@pytest.mark.parametrize(
    "changes",
    [{}, {"attention_bias": True}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4, "rope_theta": 50.0}],
    ids=["official", "biases", "tied", "as many heads"],
)
def test_sdar_gives_the_logits_of_the_plain_model(changes, tmp_path, load, logits):
    # The harness's attention looks in both directions, as in one open block.
    config, _ = write_sdar(tmp_path, block_size=64, **changes)
    check_same_logits(SDARForCausalLM, tmp_path, config, load, logits)


@pytest.mark.parametrize(
    ("write", "native_class", "changes"),
    [(write_unequal_llada, LLaDAModelLM, {}), (write_unequal_llada, LLaDAModelLM, {"n_kv_heads": 3,
      "include_bias": True}), (write_unequal_dream, DreamModel, {})],
    ids=["llada", "llada, grouped queries and biases", "dream"],
)  # fmt: skip
def test_blocks_of_different_sizes(write, native_class, changes, tmp_path, load, logits):
    config, _ = write(tmp_path, **changes)
    assert len({json.dumps(sizes) for sizes in config["sinkprune_block_sizes"]}) == 2
    check_same_logits(native_class, tmp_path, config, load, logits)


def test_blocks_that_ranks_cannot_share_are_refused_before_any_is_started(tmp_path, load):
    write_unequal_llada(tmp_path, n_kv_heads=3)
    with pytest.raises(ValueError, match=r"decoder block 0 has 3 key and value heads, .*=2; use 1"):
        load(tmp_path, tensor_parallel_size=2)


def test_bfloat16_rounds_as_the_native_class(tmp_path, load, logits):
    """Norms and rotary embedding in float32, the rest in bfloat16: as close as the native class is to its float32."""
    torch.cpu._init_amx()
    config, _ = write_llada(tmp_path, d_model=96, n_layers=3)
    tokens = tokens_of(config)
    with torch.no_grad():
        exact, expected = (
            LLaDAModelLM.from_pretrained(tmp_path, dtype=dtype)(tokens[None]).logits[0].float()
            for dtype in (torch.float32, torch.bfloat16)
        )
    found = logits(*load(tmp_path, dtype="bfloat16"), tokens).float()
    own = (expected - exact).square().mean().sqrt()
    assert (found - exact).square().mean().sqrt() < 1.25 * own
    assert own < 0.05


def test_rotary_embedding_in_bfloat16(tmp_path, load, monkeypatch):
    """LLaDA rotates in float32 whatever the model's dtype."""
    prepare_vllm()
    from vllm.model_executor.layers.attention import Attention

    write_llada(tmp_path)
    model, _ = load(tmp_path, dtype="bfloat16")
    monkeypatch.setattr(Attention, "forward", lambda self, q, k, v: torch.cat([q, k, v], dim=-1))
    attn = model.model.transformer.blocks[0].attn
    positions = torch.randperm(64)
    qkv = torch.randn(64, 3 * 48, dtype=torch.bfloat16)
    device = attn.rotary.cos_sin_cache.device
    found = attn.attend(positions.to(device), qkv.clone().to(device)).cpu()

    q, k, v = (x.unflatten(-1, (6, 8)).transpose(0, 1)[None] for x in qkv.split(48, dim=-1))
    cos, sin = RotaryTables(8, 500000.0, full_precision=True)(qkv[None], positions[None])
    expected = torch.cat(
        [x[0].transpose(0, 1).flatten(1) for x in (apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v)], dim=-1
    )
    # Another order of the same three float32 operations; rarely it is the difference between two neighbours in
    # bfloat16. Rotated in bfloat16, every eighth element would differ.
    assert (found == expected).float().mean() > 0.999
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-3)


def test_rows_of_a_step(tmp_path, load, logits):
    """Hidden states that the sampler will project, and what the model state does to all of them."""
    config, _ = write_llada(tmp_path)
    model, vllm_config = load(tmp_path)
    tokens = tokens_of(config)
    everything = logits(model, vllm_config, tokens)
    device = next(model.parameters()).device
    model.pick_rows = lambda hidden: hidden[[3, 7, 39]]
    picked = logits(model, vllm_config, tokens)
    with torch.inference_mode():
        torch.testing.assert_close(model.project(picked.to(device)).cpu(), everything[[3, 7, 39]])
    from vllm.forward_context import set_forward_context

    with torch.inference_mode(), set_forward_context(None, vllm_config):
        tokens, positions = tokens.to(device), torch.arange(len(tokens), device=device)
        plain = model(tokens, positions)
        moved = model(tokens, positions, shift=lambda hidden: hidden.roll(1, 0))
        embedded = model(None, positions, inputs_embeds=model.embed_input_ids(tokens))
    assert torch.equal(moved, plain.roll(1, 0))
    assert torch.equal(embedded, plain)


@pytest.mark.parametrize(
    ("write", "layer"),
    [(write_llada, "blocks"), (write_dream, "layers"), (write_nemotron_labs, "layers"), (write_sdar, "layers")],
)
def test_every_parameter_comes_from_the_checkpoint(write, layer, tmp_path, load):
    _, tensors = write(tmp_path)
    model, _ = load(tmp_path, load_format="dummy")
    assert model.checkpoint_names() == set(tensors)
    assert any(f".{layer}.1." in name for name in tensors)


def test_a_missing_weight_is_refused(tmp_path, load):
    write_llada(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.transformer.blocks.1.k_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"^model\.transformer\.blocks\.1\.k_proj\.weight is in no file"):
        load(tmp_path)


def test_a_bias_without_place_is_refused(tmp_path, load):
    write_llada(tmp_path, include_qkv_bias=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"include_qkv_bias": False}))
    with pytest.raises(UsageError, match=r"k_proj\.bias is in the checkpoint"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("write", "changes", "option"),
    [(write_llada, {"alibi": True}, "alibi"), (write_llada, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
      "rope_scaling"), (write_dream, {"use_sliding_window": True, "sliding_window": 32}, "use_sliding_window")],
)  # fmt: skip
def test_options_that_are_not_computed(write, changes, option, tmp_path, load):
    write(tmp_path, **changes)
    with pytest.raises(UsageError, match=f"^{option}="):
        load(tmp_path)
