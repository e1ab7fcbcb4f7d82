"""Blockwise recovery of mixtures: experts learn from their own tokens, in groups; zeros and removed experts stay."""

import pytest
import torch
from command_line import run_here
from llmcompressor.core import reset_session
from loguru import logger
from tiny_moe import write_tiny_moe

from sinkprune_plugin.loading import load_model
from sinkprune_plugin.models.expert_lists import expert_counts
from sinkprune_plugin.modifiers import block_recovery, blockwise_recovery
from sinkprune_plugin.modifiers.block_fit import state_bytes
from sinkprune_plugin.modifiers.blockwise_recovery import BlockwiseRecoveryModifier
from sinkprune_plugin.modifiers.experts import ExpertPruningModifier
from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier

GRID = {"diffusion_steps": 4, "sample_interval": 2}
# Without held-out samples, so that every block changes however few there are.
QUICK = {**GRID, "epochs": 8, "held_out": 0.0, "step_windows": 2}
WANDA = {"mask_structure": "2:4", **GRID}
PATHS = ("gate_proj", "up_proj", "down_proj")
# Bytes of an expert's three Linears in float32 with all that training adds.
EXPERT = state_bytes([3 * 192 * 128], torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """tiny-llada dealt to eight experts in each block."""
    folder = tmp_path_factory.mktemp("moe") / "dense"
    write_tiny_moe(folder)
    return folder


@pytest.fixture
def windows(golden_windows):
    return golden_windows[:2, :48]


def run(folder, tokenizer, windows, *recipe):
    reset_session()
    model = load_model(folder, torch.float32)
    run_oneshot(model, tokenizer, list(recipe), windows)
    return model


@pytest.fixture
def results(monkeypatch):
    """What became of each block: its error on the passes that it was trained on, before and after."""
    found = []
    fit = blockwise_recovery.fit_blocks
    monkeypatch.setattr(
        blockwise_recovery, "fit_blocks", lambda *args, **options: found.extend(fit(*args, **options)) or found
    )
    return found


def require_closer(results):
    """Of all blocks; the inputs of later ones are those that the recovered ones before them give."""
    assert [each.index for each in results] == list(range(6))
    assert all(each.after < 0.9 * each.before for each in results), results


def linears(model):
    return {name: each.weight for name, each in model.model.layers.named_modules() if isinstance(each, torch.nn.Linear)}


def routers(model):
    return {name: value for name, value in model.state_dict().items() if name.endswith("mlp.gate.weight")}


def test_zeros_and_routers_stay_and_outputs_come_closer(folder, tokenizer, windows, results):
    pruned = run(folder, tokenizer, windows, SinkAwareWandaModifier(**WANDA))
    model = run(folder, tokenizer, windows, SinkAwareWandaModifier(**WANDA), BlockwiseRecoveryModifier(**QUICK))
    before, after = linears(pruned), linears(model)
    assert sum(".experts." in name for name in after) == 6 * 8 * 3
    assert all(torch.equal(weight == 0, before[name] == 0) for name, weight in after.items())
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed >= {name for name in after if ".experts." not in name}
    # All that a few tokens reach, and all of their Linears or none.
    experts = {name.rpartition(".")[0] for name in changed if ".experts." in name}
    assert len(experts) > 6 * 8 / 2
    assert all(f"{expert}.{path}" in changed for expert in experts for path in PATHS)
    assert all(torch.equal(value, routers(pruned)[name]) for name, value in routers(model).items())
    require_closer(results)


def test_removed_experts_stay_removed_and_the_others_make_up_for_them(folder, tokenizer, windows, results):
    remove = {"experts": [2, 3, 0, 2, 2, 1], "score": "frequency", **GRID}
    pruned = run(folder, tokenizer, windows, ExpertPruningModifier(**remove))
    model = run(folder, tokenizer, windows, ExpertPruningModifier(**remove), BlockwiseRecoveryModifier(**QUICK))
    assert list(expert_counts(model.config).values()) == [6, 5, 8, 6, 6, 7]
    assert model.config.sinkprune_kept_experts == pruned.config.sinkprune_kept_experts
    assert all(torch.equal(value, routers(pruned)[name]) for name, value in routers(model).items())
    require_closer(results)


def test_experts_are_fitted_in_groups_whose_states_fit(folder, tokenizer, windows, results, monkeypatch):
    """The limit holds three experts; attention, which isn't an expert's, is in the first group."""
    groups, lines = [], []
    fit = block_recovery.fit_weights

    def noting(index, example, weights, *rest):
        groups.append((index, sorted(weights)))
        return fit(index, example, weights, *rest)

    monkeypatch.setattr(block_recovery, "fit_weights", noting)
    sink = logger.add(lines.append, level="INFO", format="{message}")
    recovery = BlockwiseRecoveryModifier(**QUICK, expert_state_gb=3.5 * EXPERT / 1e9)
    model = run(folder, tokenizer, windows, SinkAwareWandaModifier(**WANDA), recovery)
    logger.remove(sink)
    assert [index for index, _ in groups] == [index for index in range(6) for _ in range(3)]
    of_block = [names for index, names in groups if index == 4]
    experts = [sorted({name.split(".")[2] for name in names if ".experts." in name}) for names in of_block]
    assert experts == [["0", "1", "2"], ["3", "4", "5"], ["6", "7"]]
    assert [sum("self_attn" in name for name in names) for names in of_block] == [4, 0, 0]
    pruned = run(folder, tokenizer, windows, SinkAwareWandaModifier(**WANDA))
    before, after = linears(pruned), linears(model)
    assert all(torch.equal(weight == 0, before[name] == 0) for name, weight in after.items())
    require_closer(results)
    (estimate,) = [line for line in lines if line.startswith("BlockwiseRecoveryModifier: 4 passes")]
    # 4 passes; 2 runs by both models, and 8 in training and 2 for the errors of each of three groups, in 6 blocks.
    assert f"{4 * (2 + 3 * (8 + 2)) * 6} runs of a block" in estimate
    size = 3 * EXPERT + state_bytes([4 * 192 * 192], torch.float32)
    assert f"optimizer states of a block at most {size / 1e6:.1f} MB" in estimate


def test_an_expert_that_no_token_reaches_stays_as_it_was(folder, tokenizer, windows, tmp_path):
    model = load_model(folder, torch.float32)
    with torch.no_grad():
        # Always the last choice: its products with the normalised hidden states are minus their mean square.
        gate = model.model.layers[3].mlp.gate.weight
        hidden = []
        handle = model.model.layers[3].mlp.gate.register_forward_pre_hook(lambda _module, args: hidden.append(args[0]))
        model(windows)
        handle.remove()
        gate[5] = -10 * torch.cat(hidden).mean(dim=0)
    model.save_pretrained(tmp_path)
    pruned = run(tmp_path, tokenizer, windows, SinkAwareWandaModifier(**WANDA))
    # Each expert is a group of its own, so that a step may have no token for what is trained in it.
    alone = 1.5 * EXPERT / 1e9
    recovery = BlockwiseRecoveryModifier(**{**QUICK, "step_windows": 1, "epochs": 1, "expert_state_gb": alone})
    model = run(tmp_path, tokenizer, windows, SinkAwareWandaModifier(**WANDA), recovery)
    before, after = linears(pruned), linears(model)
    same = [torch.equal(before[name], after[name]) for name in after if name.startswith("3.mlp.experts.")]
    assert all(torch.equal(before[name], after[name]) for name in after if name.startswith("3.mlp.experts.5."))
    assert sum(same) < len(same) / 2


def test_the_command_recovers_a_mixture_that_lost_experts(folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("s_stage: {s_modifiers: {ExpertPruningModifier: {experts: 0.5, score: magnitude}}}")
    done = run_here("prune", folder, "--recipe", recipe, "--output", tmp_path / "pruned")
    assert done.returncode == 0, done.stderr
    short = ("--method", "blockwise", "--steps", 8, "--seq-len", 64, "--batch-size", 2, "--device", "cpu")
    done = run_here("recover", folder, tmp_path / "pruned", "--output", tmp_path / "recovered", *short)
    assert done.returncode == 0, done.stderr
    before, after = (load_model(tmp_path / name, torch.float32) for name in ("pruned", "recovered"))
    assert after.config.num_experts == 4
    assert after.config.sinkprune_kept_experts == before.config.sinkprune_kept_experts
    assert all(torch.equal(value, routers(before)[name]) for name, value in routers(after).items())
    assert any(not torch.equal(weight, linears(before)[name]) for name, weight in linears(after).items())
