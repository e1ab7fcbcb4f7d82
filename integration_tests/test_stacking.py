"""Quantizers and scalings after a pruning modifier in one recipe: the zeros stay."""

import pytest
import torch
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.autoround import AutoRoundModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.transform import QuIPModifier, SmoothQuantModifier, SpinQuantModifier
from loguru import logger

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model
from sinkprune_plugin.models.decoder_blocks import block_linears
from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot
from sinkprune_plugin.modifiers.sparsegpt import SinkAwareSparseGPTModifier
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier

QUICK = {"diffusion_steps": 4, "sample_interval": 4}
BLOCKS = [r"re:.*\.blocks\..*"]


def pruner(cls=SinkAwareWandaModifier, **fields):
    return cls(mask_structure="2:4", **QUICK, **fields)


def gptq(**weights):
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64, **weights}
    return GPTQModifier(config_groups={"group_0": {"targets": BLOCKS, "weights": weights}})


def follows_2_of_4(weight):
    return bool(((weight.reshape(weight.shape[0], -1, 4) == 0).sum(-1) >= 2).all())


@pytest.fixture
def windows(golden_windows):
    return golden_windows[:1, :64]


@pytest.fixture
def pruned_alone(model, tokenizer, windows):
    """Weights of the model as each modifier leaves it, with no modifier after it."""
    cache = {}

    def run(cls):
        if cls not in cache:
            run_oneshot(model, tokenizer, pruner(cls), windows)
            cache[cls] = {name: module.weight.detach().clone() for name, module in block_linears(model).items()}
        return cache[cls]

    return run


@pytest.mark.parametrize(
    ("cls", "weights"),
    [
        (SinkAwareWandaModifier, {}),
        (SinkAwareSparseGPTModifier, {"symmetric": False}),
        (SinkAwareWandaModifier, {"num_bits": 8, "strategy": "channel", "group_size": None}),
        (SinkAwareWandaModifier, {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None}),
    ],
)
def test_gptq_keeps_the_zeros_and_saves_what_is_in_memory(cls, weights, tokenizer, windows, pruned_alone, tmp_path):
    model = load_model(EMBEDDED_MODEL, torch.float32)
    run_oneshot(model, tokenizer, [pruner(cls), gptq(**weights)], windows)
    for name, module in block_linears(model).items():
        before = pruned_alone(cls)[name]
        assert bool((module.weight[before == 0] == 0).all()), name
        assert not torch.equal(module.weight, before), name
        assert not module._forward_pre_hooks
    quantized = {name: module.weight.detach().clone() for name, module in block_linears(model).items()}
    model.save_pretrained(str(tmp_path))
    for name, module in block_linears(decompressed(tmp_path)).items():
        torch.testing.assert_close(module.weight.float(), quantized[name], rtol=1e-3, atol=1e-6)
        assert bool((module.weight[pruned_alone(cls)[name] == 0] == 0).all()), name


def decompressed(directory):
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    config = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, quantization_config=config)


def test_later_blocks_are_calibrated_on_weights_with_the_zeros_put_back(model, tokenizer, windows):
    """While GPTQ calibrates block 1, its inputs come from a block 0 that is already quantized and sparse."""
    first, second = model.model.transformer.blocks[:2]
    seen = []
    handles = [
        second.register_forward_pre_hook(
            lambda *_: seen.append(
                (
                    all(follows_2_of_4(x.weight) for x in first.modules() if isinstance(x, torch.nn.Linear)),
                    torch.equal(first.q_proj.weight, dense),
                )
            )
        )
    ]
    dense = first.q_proj.weight.detach().clone()
    run_oneshot(model, tokenizer, [pruner(), gptq()], windows)
    for handle in handles:
        handle.remove()
    behind_pruning = [sparse for sparse, unchanged in seen if not unchanged]
    assert len(behind_pruning) >= 2 * len(windows)
    assert all(behind_pruning)


def test_autoround_keeps_the_zeros(tokenizer, windows, pruned_alone):
    model = load_model(EMBEDDED_MODEL, torch.float32)
    rounding = AutoRoundModifier(config_groups=gptq().config_groups, iters=1, enable_torch_compile=False)
    run_oneshot(model, tokenizer, [pruner(), rounding], windows)
    for name, module in block_linears(model).items():
        before = pruned_alone(SinkAwareWandaModifier)[name]
        assert bool((module.weight[before == 0] == 0).all()), name
        assert not torch.equal(module.weight, before), name


def test_a_scaling_keeps_the_zeros(tokenizer, windows, pruned_alone):
    """AWQ scales rows and columns likewise, but doesn't run without an accelerator."""
    model = load_model(EMBEDDED_MODEL, torch.float32)
    scaling = SmoothQuantModifier(mappings=[[["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*attn_norm"]])
    run_oneshot(model, tokenizer, [pruner(), scaling], windows)
    alone = pruned_alone(SinkAwareWandaModifier)
    for name, module in block_linears(model).items():
        assert bool((module.weight[alone[name] == 0] == 0).all()), name
        assert torch.equal(module.weight, alone[name]) != name.endswith(("q_proj", "k_proj", "v_proj")), name


@pytest.mark.parametrize("cls", [QuIPModifier, SpinQuantModifier])
def test_rotations_behind_pruning_are_refused(cls, model, tokenizer, windows):
    with pytest.raises(UsageError, match=f"{cls.__name__} after SinkAwareWandaModifier rotates the weights") as caught:
        run_oneshot(model, tokenizer, [pruner(), cls()], windows)
    assert "\n" not in str(caught.value)


class ShiftModifier(Modifier):
    """A third-party modifier that this package doesn't know."""

    def on_initialize(self, state, **kwargs):
        return True

    def on_calibration_start(self, state, event, **kwargs):
        with torch.no_grad():
            state.model.model.transformer.blocks[3].q_proj.weight.add_(1.0)


def test_zeros_that_an_unknown_modifier_fills_are_reported(model, tokenizer, windows):
    lines = []
    handle = logger.add(lambda message: lines.append(message.record["message"]), level="WARNING")
    run_oneshot(model, tokenizer, [pruner(), ShiftModifier()], windows)
    logger.remove(handle)
    (line,) = [line for line in lines if "not zero any more" in line]
    assert f"{192 * 192 // 2} weights of model.transformer.blocks.3.q_proj" in line


@pytest.mark.usefixtures("process_group")
def test_log_handlers_of_the_caller_outlive_a_run_in_a_process_group(model, tokenizer, windows):
    """There llm-compressor sets up logging anew; vLLM's engine leaves such a group of one process behind."""
    lines = []
    handle = logger.add(lines.append, format="{message}", level="INFO")
    run_oneshot(model, tokenizer, pruner(), windows)
    logger.remove(handle)
    assert any("of them transient" in line for line in lines)
