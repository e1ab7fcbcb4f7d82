"""Structured pruning through oneshot(): what is removed, that the rest computes the same, and how it is saved."""

import json

import pytest
import torch
import torch.nn.functional as F
import yaml
from golden_data import GOLDEN
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from loguru import logger
from official_checkpoints import write_dream, write_llada
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model
from sinkprune_plugin.models.block_sizes import block_sizes, units_of
from sinkprune_plugin.models.decoder_blocks import block_linears, find_decoder_blocks
from sinkprune_plugin.modifiers import structured_allocation
from sinkprune_plugin.modifiers.admm import SinkAwareADMMModifier
from sinkprune_plugin.modifiers.oneshot_flow import calibration_dataset, run_oneshot
from sinkprune_plugin.modifiers.structured import SinkAwareStructuredModifier
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier

QUICK = {"diffusion_steps": 2, "sample_interval": 1}


def structured(**fields):
    return SinkAwareStructuredModifier(**QUICK, **fields)


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def widths(model):
    return [(each.mlp_channels, each.attention_heads) for each in block_sizes(model)]


def with_units_zeroed(dense, small):
    """The dense model with the columns of all removed units zero and those that stay as in the small model.

    Which units stayed shows in the rows that nothing changed.
    """
    units, head_dim = units_of(dense), dense.config.head_dim
    for big, little in zip(find_decoder_blocks(dense)[1], find_decoder_blocks(small)[1], strict=True):
        for rows, columns, each in (
            (units.channel_rows[0], units.channel_columns, 1),
            (units.head_rows, units.head_columns, head_dim),
        ):
            before, after = (block.get_submodule(rows).weight.unflatten(0, (-1, each)) for block in (big, little))
            kept = [next(i for i, row in enumerate(before) if torch.equal(row, wanted)) for wanted in after]
            weight = torch.zeros_like(big.get_submodule(columns).weight).unflatten(1, (-1, each))
            weight[:, kept] = little.get_submodule(columns).weight.unflatten(1, (-1, each))
            big.get_submodule(columns).weight.data = weight.flatten(1)
    return dense


def test_the_smaller_model_computes_what_the_dense_one_does_with_the_units_zeroed(
    model, tokenizer, golden_windows, tmp_path
):
    modifier = structured(mlp_channels=[0.5, 0.25, 64, 0, 0.9, 0.3], attention_heads=2)
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=calibration_dataset(golden_windows[:1, :96]),
        recipe=[modifier],
        num_calibration_samples=1,
        max_seq_length=96,
        output_dir=str(tmp_path),
    )
    expected = [(256, 4), (384, 4), (448, 4), (512, 4), (48, 4), (360, 4)]
    assert widths(model) == expected
    reference = with_units_zeroed(load_model(EMBEDDED_MODEL, torch.float32), model)
    tokens = golden_windows[2:3, :96]
    # Float32 sums over other numbers of terms, of logits up to 20.
    torch.testing.assert_close(logits(model, tokens), logits(reference, tokens), rtol=1e-4, atol=1e-3)
    again = load_model(tmp_path)
    assert widths(again) == expected
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert not any(
        "sparsity_config" in str(value) for value in json.loads((tmp_path / "config.json").read_text()).items()
    )
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_grouped_query_attention_loses_whole_groups(tmp_path):
    write_dream(tmp_path / "dense", num_hidden_layers=3, num_attention_heads=14, num_key_value_heads=7)
    dense, model = (load_model(tmp_path / "dense", torch.float32) for _ in range(2))
    tokens = torch.arange(3, 67).view(2, 32)
    run_oneshot(model, None, structured(attention_heads=0.4, mlp_channels=0.5), tokens)
    sizes = block_sizes(model)
    assert {(each.attention_heads, each.key_value_heads) for each in sizes} == {(8, 4)}
    reference = with_units_zeroed(dense, model)
    torch.testing.assert_close(logits(model, tokens), logits(reference, tokens), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "small")
    assert torch.equal(logits(load_model(tmp_path / "small"), tokens), logits(model, tokens))


def test_blocks_that_change_the_predictions_least_go(tokenizer, tmp_path):
    write_llada(tmp_path, n_layers=4)
    model = load_model(tmp_path, torch.float32)
    blocks = find_decoder_blocks(model)[1]
    # A block that adds almost nothing, and one that adds little.
    for index, factor in ((1, 1e-3), (3, 0.2)):
        for part in ("attn_out", "ff_out"):
            blocks[index].get_submodule(part).weight.data *= factor
    tokens = torch.arange(3, 67).view(2, 32)
    stays = [blocks[0], blocks[2]]
    run_oneshot(model, tokenizer, structured(blocks=0.5), tokens)
    assert [*find_decoder_blocks(model)[1]] == stays
    assert model.config.n_layers == 2


@pytest.mark.parametrize("score", ["magnitude", "wanda"])
def test_other_scores_with_and_without_compensation(score, tokenizer, golden_windows):
    tokens = golden_windows[2:3, :96]
    whole = logits(load_model(EMBEDDED_MODEL, torch.float32), tokens)
    errors = []
    for compensate in (True, False):
        model = load_model(EMBEDDED_MODEL, torch.float32)
        modifier = structured(mlp_channels=0.5, score=score, compensate=compensate, target="current")
        run_oneshot(model, tokenizer, modifier, golden_windows[:1, :96])
        assert set(widths(model)) == {(256, 6)}
        errors.append(float(F.mse_loss(logits(model, tokens), whole)))
    assert errors[0] < errors[1]


def test_ignored_blocks_and_kinds_are_left_alone(model, tokenizer, golden_windows):
    modifier = structured(
        mlp_channels=0.5, attention_heads=1, ignore=["re:.*blocks\\.0\\..*", "re:.*blocks\\.1\\.up_proj"]
    )
    run_oneshot(model, tokenizer, modifier, golden_windows[:1, :96])
    assert widths(model) == [(512, 6), (512, 5), *[(256, 5)] * 4]


def test_offloaded_blocks_become_the_same(tokenizer, golden_windows, tmp_path):
    plain = load_model(EMBEDDED_MODEL, torch.float32)
    fields = {"mlp_channels": 0.5, "attention_heads": 1, "blocks": 1}
    run_oneshot(plain, tokenizer, structured(**fields), golden_windows[:1, :96])
    places = {"wte": "cpu", "ln_f": "cpu", "ff_out": "cpu", "blocks": "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        EMBEDDED_MODEL,
        dtype=torch.float32,
        device_map={f"model.transformer.{name}": place for name, place in places.items()},
        offload_folder=tmp_path / "offload",
    )
    run_oneshot(offloaded, tokenizer, structured(**fields), golden_windows[:1, :96])
    for (name, a), (_, b) in zip(block_linears(plain).items(), block_linears(offloaded).items(), strict=True):
        assert torch.equal(a.weight, b.weight), name


# ---- widths that differ from block to block


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_widths_by_error_keep_the_number_of_parameters(model, tokenizer, golden_windows):
    uniform = load_model(EMBEDDED_MODEL, torch.float32)
    run_oneshot(uniform, tokenizer, structured(mlp_channels=0.5), golden_windows[:1, :96])
    modifier = structured(mlp_channels=0.5, allocation="error")
    run_oneshot(model, tokenizer, modifier, golden_windows[:1, :96])
    assert parameters(model) == parameters(uniform)
    assert len(set(widths(model))) > 1
    # The recipe that is saved repeats it.
    assert modifier.allocation == "uniform"
    assert modifier.mlp_channels == [512 - channels for channels, _ in widths(model)]


@pytest.mark.parametrize("budget_of", ["parameters", "flops"])
def test_a_search_meets_its_budget(budget_of, model, tokenizer, golden_windows, tmp_path):
    dense = load_model(EMBEDDED_MODEL, torch.float32)
    tokens = golden_windows[:1, :96]
    modifier = structured(allocation="search", budget="1.4x", budget_of=budget_of, blocks=1, search_budget=6000)
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=calibration_dataset(tokens),
        recipe=[modifier],
        num_calibration_samples=1,
        max_seq_length=96,
        output_dir=str(tmp_path),
    )

    def cost(each):
        if budget_of == "parameters":
            return parameters(each)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            each(tokens)
        return counter.get_total_flops()

    # The next width more would cost about a hundredth of the whole.
    assert 1.4 <= cost(dense) / cost(model) < 1.45
    assert len(widths(model)) == 5
    assert widths(load_model(tmp_path)) == widths(model)
    saved = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    (fields,) = [each["SinkAwareStructuredModifier"] for stage in saved.values() for each in stage.values()]
    assert "budget" not in fields or fields["budget"] is None
    assert len(fields["mlp_channels"]) == 6
    if budget_of == "flops":
        again = load_model(EMBEDDED_MODEL, torch.float32)
        run_oneshot(again, tokenizer, str(tmp_path / "recipe.yaml"), tokens)
        assert widths(again) == widths(model)


def test_a_budget_of_time_is_met_by_the_table_it_was_timed_in(model, tokenizer, golden_windows):
    lines = []
    handle = logger.add(lambda line: lines.append(str(line)), level="INFO")
    modifier = structured(allocation="error", budget="1.2x", latency_batch_size=2)
    run_oneshot(model, tokenizer, modifier, golden_windows[:1, :96])
    logger.remove(handle)
    (line,) = [line for line in lines if "widths chosen by error" in line]
    assert float(line.split("error, ")[1].split("x of latency")[0]) >= 1.2
    assert parameters(model) < parameters(load_model(EMBEDDED_MODEL, torch.float32))


def test_a_budget_out_of_reach_is_refused_before_anything_is_solved(model, tokenizer, golden_windows, monkeypatch):
    monkeypatch.setattr(SinkAwareStructuredModifier, "_solve_all_levels", lambda *_: pytest.fail("levels were solved"))
    modifier = structured(allocation="search", budget="9x", budget_of="parameters")
    with pytest.raises(
        UsageError, match=r"budget of 9x of parameters is out of reach: with the smallest widths it is 2\."
    ):
        run_oneshot(model, tokenizer, modifier, golden_windows[:1, :96])
    monkeypatch.setattr(structured_allocation, "MEMORY_SHARE", 1e-6)
    modifier = structured(allocation="search", budget="1.5x", budget_of="parameters")
    reset_session()
    with pytest.raises(UsageError, match=r"widths that the search chooses from take 0\.0 GB .*lower `levels`"):
        run_oneshot(model, tokenizer, modifier, golden_windows[:1, :96])
    assert set(widths(model)) == {(512, 6)}


# ---- with other modifiers in one recipe


def test_single_weights_after_units(model, tokenizer, golden_windows):
    recipe = [
        structured(mlp_channels=0.3, blocks=1),
        SinkAwareADMMModifier(mask_structure="2:4", **QUICK),
        SinkAwareWandaModifier(sparsity=[0.5, 0.6, 0.7, 0.8, 0.9], targets=["re:.*q_proj"], **QUICK),
    ]
    run_oneshot(model, tokenizer, recipe, golden_windows[:1, :96])
    assert widths(model) == [(360, 6)] * 5
    for name, linear in block_linears(model).items():
        groups = linear.weight.reshape(linear.out_features, -1, 4)
        assert bool(((groups == 0).sum(-1) >= 2).all()), name
    last = find_decoder_blocks(model)[1][-1].q_proj.weight
    assert float((last == 0).float().mean()) == pytest.approx(0.9, abs=0.01)


def test_units_after_single_weights_whose_zeros_stay(model, tokenizer, golden_windows, tmp_path):
    warnings = []
    handle = logger.add(lambda line: warnings.append(str(line)), level="WARNING")
    recipe = [SinkAwareWandaModifier(sparsity=0.5, **QUICK), structured(mlp_channels=0.5, attention_heads=2, blocks=1)]
    run_oneshot(model, tokenizer, recipe, golden_windows[:1, :96])
    logger.remove(handle)
    assert not [line for line in warnings if "not zero any more" in line]
    assert widths(model) == [(256, 4)] * 5
    for name, linear in block_linears(model).items():
        # Half of every row before columns went: those that stay have fewer zeros than those that went.
        assert 0.2 < float((linear.weight == 0).float().mean()) < 0.6, name
    model.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["sparsity_config"]
    again = load_model(tmp_path)
    assert torch.equal(
        again.state_dict()["model.transformer.blocks.0.ff_out.weight"],
        model.state_dict()["model.transformer.blocks.0.ff_out.weight"],
    )


FP8 = {"targets": ["Linear"], "scheme": "FP8_DYNAMIC", "ignore": ["re:.*transformer\\.ff_out$"]}
W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
BLOCKS = [r"re:.*\.blocks\..*"]


@pytest.mark.parametrize(
    "recipe",
    [
        [structured(mlp_channels=0.5, blocks=1), QuantizationModifier(**FP8)],
        [structured(mlp_channels=0.5), GPTQModifier(config_groups={"g": {"targets": BLOCKS, "weights": W4}})],
        [QuantizationModifier(**FP8), structured(mlp_channels=0.5, blocks=1)],
    ],
    ids=["units then FP8", "units then GPTQ in groups", "FP8 then units"],
)
def test_quantization_before_and_after(recipe, model, tokenizer, golden_windows, tmp_path):
    run_oneshot(model, tokenizer, recipe, golden_windows[:1, :128])
    assert {channels for channels, _ in widths(model)} == {256}
    tokens = golden_windows[2:3]
    expected = logits(model, tokens)
    model.save_pretrained(str(tmp_path))
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert quantization["config_groups"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    # The weights are those of the quantized grid, up to the dtype of the scales.
    assert float((logits(again, tokens) - expected).abs().max()) < 0.05 * float(expected.abs().max())


# ---- figures


@pytest.mark.parametrize(("share", "limit"), [(0.3, 62.6), (0.5, 68.2)])
def test_figures_without_training(share, limit, model, tokenizer, golden_windows, evaluate):
    """Defaults on 16 × 256 tokens; dense 59.6, Wanda-sp on clean text 67.0 and 82.9."""
    assert (GOLDEN / "evaluation.safetensors").is_file()
    run_oneshot(model, tokenizer, SinkAwareStructuredModifier(mlp_channels=share), golden_windows)
    assert evaluate(model) <= limit
