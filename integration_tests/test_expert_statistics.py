"""Statistics of the Linears of routed experts: only their tokens count, times the router's weight."""

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.core import State
from official_checkpoints import write_llada2, write_llada_moe
from transformers import MixtralConfig, MixtralForCausalLM

from sinkprune_plugin.diffusion import DiffusionFamily, resolve_diffusion
from sinkprune_plugin.diffusion.families import _FAMILIES
from sinkprune_plugin.loading import load_model
from sinkprune_plugin.modifiers import allocating_base
from sinkprune_plugin.modifiers.admm import SinkAwareADMMModifier
from sinkprune_plugin.modifiers.allocating_base import _together
from sinkprune_plugin.modifiers.calibration import CalibrationBatch
from sinkprune_plugin.modifiers.hessian_base import HessianModifierBase
from sinkprune_plugin.modifiers.oneshot_flow import calibration_dataset, run_oneshot
from sinkprune_plugin.modifiers.sparsegpt import SinkAwareSparseGPTModifier
from sinkprune_plugin.modifiers.trajectory import TrajectoryCorruption
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier

QUICK = {"diffusion_steps": 4, "sample_interval": 2, "save_format": "dense"}
# No position is a sink, so every token has weight 1.
ALL_TOKENS = {**QUICK, "sink_std": 1e6}
EXPERTS, CHOSEN = 6, 2
# float32 sums in other orders.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    write_llada_moe(folder, vocab_size=2048, num_experts=EXPERTS, num_experts_per_tok=CHOSEN, torch_dtype="float32")
    return folder


@pytest.fixture
def moe(folder):
    return load_model(folder, torch.float32)


@pytest.fixture(scope="module")
def windows():
    return torch.randint(3, 2048, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def taken(monkeypatch):
    """Leader → complete statistics, of every modifier that runs."""
    seen = {}
    for cls in (HessianModifierBase, SinkAwareWandaModifier):

        def take(self, leader, original=cls._take_statistics):
            statistics = original(self, leader)
            # What is taken last is what the solver gets.
            seen[leader] = [each.clone() for each in statistics]
            return statistics

        monkeypatch.setattr(cls, "_take_statistics", take)
    return seen


def inputs_of_first_experts(model, windows, floor=1):
    """(tokens, router weights (tokens, E), 0 where not chosen) of the first layer with experts, for each pass.

    An expert that gets fewer than ``floor`` tokens in all gets all of them with weight 1.
    """
    corruption = TrajectoryCorruption(resolve_diffusion(model.config), 0, 1e-3)
    seen = []
    layer = model.model.layers[0].mlp
    handle = layer.register_forward_pre_hook(lambda _module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for index, window in enumerate(windows):
            batch = CalibrationBatch(index, window[None], None)
            for step, timestep in enumerate((0.5, 1.0)):
                model(corruption(batch, step, timestep))
        handle.remove()
        result = []
        for tokens in seen:
            top, chosen = (tokens @ layer.gate.weight.T).softmax(-1).topk(CHOSEN)
            result.append((tokens, torch.zeros(len(tokens), EXPERTS).scatter(1, chosen, top)))
    fed = sum((gates > 0).sum(dim=0) for _, gates in result) < floor
    return [(tokens, torch.where(fed, 1.0, gates)) for tokens, gates in result]


def plain_hessian(rows, weights):
    rows = rows * weights[:, None]
    return rows.T @ rows


def hidden_of(expert, tokens):
    with torch.no_grad():
        return expert.act_fn(expert.gate_proj(tokens)) * expert.up_proj(tokens)


def test_an_expert_counts_its_tokens_times_the_routers_weight(moe, tokenizer, windows, taken, folder):
    modifier = SinkAwareSparseGPTModifier(sparsity=0.5, min_expert_tokens=0, **ALL_TOKENS)
    run_oneshot(moe, tokenizer, modifier, windows)
    dense = load_model(folder, torch.float32)
    require_statistics(dense, inputs_of_first_experts(dense, windows), taken)


def require_statistics(dense, passes, taken):
    for number, expert in enumerate(dense.model.layers[0].mlp.experts):
        name = f"model.layers.0.mlp.experts.{number}"
        expected = sum(plain_hessian(tokens, gates[:, number]) for tokens, gates in passes)
        torch.testing.assert_close(taken[f"{name}.gate_proj"][0], expected, **CLOSE)
        expected = sum(plain_hessian(hidden_of(expert, tokens), gates[:, number]) for tokens, gates in passes)
        torch.testing.assert_close(taken[f"{name}.down_proj"][0], expected, **CLOSE)
        # up_proj has the same input.
        assert f"{name}.up_proj" not in taken


def test_wanda_has_a_norm_for_each_sample_and_timestep(moe, tokenizer, windows, taken, folder):
    # In one batch, so that samples have to be told apart.
    modifier = SinkAwareWandaModifier(sparsity=0.5, min_expert_tokens=0, **ALL_TOKENS)
    run_oneshot(moe, tokenizer, modifier, windows, batch_size=2)
    passes = inputs_of_first_experts(load_model(folder, torch.float32), windows)
    for number in range(EXPERTS):
        expected = sum((tokens * gates[:, number : number + 1]).norm(dim=0) for tokens, gates in passes)
        found = taken[f"model.layers.0.mlp.experts.{number}.gate_proj"][0]
        torch.testing.assert_close(found.float(), expected, **CLOSE)


def test_an_expert_with_too_few_tokens_has_statistics_of_all_tokens(moe, tokenizer, windows, taken, folder):
    dense = load_model(folder, torch.float32)
    counts = sum((gates > 0).sum(dim=0) for _, gates in inputs_of_first_experts(dense, windows, floor=0))
    floor = int(counts.sort().values[EXPERTS // 2]) + 1
    assert 0 < int((counts < floor).sum()) < EXPERTS
    modifier = SinkAwareSparseGPTModifier(sparsity=0.5, min_expert_tokens=floor, **ALL_TOKENS)
    run_oneshot(moe, tokenizer, modifier, windows)
    require_statistics(dense, inputs_of_first_experts(dense, windows, floor), taken)


@pytest.mark.parametrize("within_block", ["parallel", "sequential"])
def test_experts_in_groups_give_what_all_at_once_give(within_block, folder, tokenizer, windows, monkeypatch):
    groups = []
    original = HessianModifierBase._groups

    def count(self, block, targets):
        groups.append(original(self, block, targets))
        return groups[-1]

    monkeypatch.setattr(HessianModifierBase, "_groups", count)
    results = []
    # A Hessian of 48 columns takes 9216 bytes, one of 40 takes 6400: two experts, then all.
    for limit in (2 * (9216 + 6400) * 1e-9, 8.0):
        model = load_model(folder, torch.float32)
        modifier = SinkAwareSparseGPTModifier(
            sparsity=0.5, within_block=within_block, expert_hessian_gb=limit, min_expert_tokens=0, **QUICK
        )
        run_oneshot(model, tokenizer, modifier, windows)
        results.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    few, all_at_once = groups[:2], groups[2:]
    assert max(sum(t.expert is not None for t in group) for part in few for group in part) < EXPERTS * 2
    assert len(few[0]) > len(all_at_once[0])
    assert all(torch.equal(results[0][name], tensor) for name, tensor in results[1].items())


@pytest.mark.parametrize("limit", [8.0, 1e-9])
def test_admm_with_the_dense_target_prunes_every_expert_and_stays_closer_than_magnitude(
    limit, moe, folder, tokenizer, windows
):
    modifier = SinkAwareADMMModifier(
        mask_structure="2:4", iterations=4, gradual_iterations=3, expert_hessian_gb=limit, **QUICK
    )
    assert modifier.target == "dense"
    run_oneshot(moe, tokenizer, modifier, windows)
    dense, magnitude = load_model(folder, torch.float32), load_model(folder, torch.float32)
    linears = {n: m for n, m in moe.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
    assert sum("experts" in name for name in linears) == 2 * EXPERTS * 3
    for name, module in linears.items():
        assert float((module.weight == 0).float().mean()) == 0.5, name
    with torch.no_grad():
        for module in magnitude.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                groups = module.weight.view(len(module.weight), -1, 4)
                groups.scatter_(-1, groups.abs().topk(2, dim=-1, largest=False).indices, 0.0)
    # What is fitted: outputs of the first block on the calibration's own tokens.
    reference = first_outputs(dense, windows)
    errors = [float((first_outputs(model, windows) - reference).square().sum()) for model in (moe, magnitude)]
    assert errors[0] < 0.5 * errors[1], errors


def first_outputs(model, windows):
    """(passes, B, T, d) outputs of the first block on the corrupted windows."""
    seen = []
    handle = model.model.layers[0].register_forward_hook(
        lambda _module, _args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    inputs_of_first_experts(model, windows)
    handle.remove()
    return torch.stack(seen)


@pytest.fixture
def mixtral(monkeypatch, tmp_path):
    """Experts of transformers, which oneshot() splits before the modifiers see the model."""
    monkeypatch.setitem(_FAMILIES, "mixture", DiffusionFamily("mixture", ("mixtral",), default_mask_token_id=2))
    torch.manual_seed(0)
    sizes = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(tmp_path)
    return lambda: MixtralForCausalLM.from_pretrained(tmp_path).eval()


@pytest.mark.parametrize("kind", ["native", "split by llm-compressor"])
def test_with_all_experts_calibrated_the_statistics_are_the_same(kind, folder, mixtral, tokenizer, windows, taken):
    found = []
    for all_experts in (True, False):
        model = load_model(folder, torch.float32) if kind == "native" else mixtral()
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=calibration_dataset(windows),
            recipe=SinkAwareSparseGPTModifier(sparsity=0.5, min_expert_tokens=0, **ALL_TOKENS),
            num_calibration_samples=len(windows),
            max_seq_length=windows.shape[1],
            moe_calibrate_all_experts=all_experts,
        )
        # Later blocks get the outputs of pruned ones, where a rounding may decide about a weight.
        found.append({name: each[0] for name, each in taken.items() if "layers.0." in name and "experts" in name})
        taken.clear()
    number = 2 * (EXPERTS if kind == "native" else 4)
    assert len(found[0]) == len(found[1]) == number
    assert not torch.equal(*list(found[0].values())[:3:2])
    for name, statistics in found[0].items():
        torch.testing.assert_close(statistics, found[1][name], **CLOSE, msg=name)


@pytest.mark.parametrize("hessian_gb", [8.0, 2e-5])
def test_errors_of_an_allocation_count_an_experts_tokens_times_the_routers_weight(
    hessian_gb, moe, tokenizer, windows, monkeypatch
):
    """Also where two experts' Hessians (2.6 kB for the inputs of 40 channels, 9 kB for those of 48) fit the limit."""
    found, before = {}, {}
    solve = SinkAwareSparseGPTModifier._solve_levels

    def recording(self, engine, passes, by_block, receive, **options):
        before.update({name: each.weight.clone() for name, each in engine.model.named_modules() if is_linear(each)})

        def both(name, weights, errors, power):
            found[name] = weights, errors, power
            receive(name, weights, errors, power)

        solve(self, engine, passes, by_block, both, **options)

    monkeypatch.setattr(SinkAwareSparseGPTModifier, "_solve_levels", recording)
    passes = inputs_of_first_experts(moe, windows)
    layer = moe.model.layers[0].mlp.experts
    inputs = {"gate_proj": lambda _, x: x, "up_proj": lambda _, x: x, "down_proj": hidden_of}
    expected, gates_of = {}, {}
    for number, expert in enumerate(layer):
        for path, of in inputs.items():
            gates_of[f"model.layers.0.mlp.experts.{number}.{path}"] = torch.cat([each[:, number] for _, each in passes])
            rows = torch.cat([of(expert, tokens) * gates[:, number : number + 1] for tokens, gates in passes])
            expected[f"model.layers.0.mlp.experts.{number}.{path}"] = rows
    modifier = SinkAwareSparseGPTModifier(
        sparsity=0.75, allocation="error", min_expert_tokens=0, expert_hessian_gb=hessian_gb, **ALL_TOKENS
    )
    run_oneshot(moe, tokenizer, modifier, windows)
    assert len([name for name in found if ".experts." in name]) == 2 * EXPERTS * 3
    for name, rows in expected.items():
        weights, errors, power = found[name]
        whole = (rows @ before[name].T).square().sum()
        # One that no token chose has the errors of all tokens, and no part in the block's.
        unchosen = bool((gates_of[name] == 1).all())
        assert power == pytest.approx(0.0 if unchosen else float(whole), rel=1e-3)
        by_hand = [float((rows @ (each - before[name]).T).square().sum() / whole) for each in weights]
        assert errors == pytest.approx(by_hand, rel=1e-3)
    # Together they are one Linear, whose output is the sum of theirs.
    for path in inputs:
        linears = [found[f"model.layers.0.mlp.experts.{number}.{path}"] for number in range(EXPERTS)]
        together = _together([(errors, power) for _, errors, power in linears])
        whole = sum(power for *_, power in linears)
        absolute = [sum(errors[level] * power for _, errors, power in linears) for level in range(len(together))]
        assert together == pytest.approx([value / whole for value in absolute])


def is_linear(module):
    return isinstance(module, torch.nn.Linear)


def test_experts_that_got_too_few_tokens_have_no_part_in_an_allocation_unless_all_did(
    moe, tokenizer, windows, monkeypatch
):
    powers = []
    monkeypatch.setattr(
        allocating_base, "_together", lambda errors: powers.append([power for _, power in errors]) or _together(errors)
    )
    # 96 tokens in all passes, two experts each, so a third of them on average.
    with torch.no_grad():
        # An expert that is the last choice of every token.
        moe.model.layers[0].mlp.gate.weight[3] = 0
    for floor, hungry in ((0, False), (10**6, True)):
        run_oneshot(
            moe,
            tokenizer,
            SinkAwareWandaModifier(sparsity=0.5, allocation="error", min_expert_tokens=floor, **QUICK),
            windows,
        )
        of_experts = [each for each in powers if len(each) == EXPERTS]
        assert len(of_experts) == 2 * 3
        assert all(all(power == 0 for power in each) == hungry for each in of_experts)
        powers.clear()


def test_padded_samples_of_a_model_that_denoises_block_by_block_are_calibrated_on(tmp_path, windows):
    """Its passes hold clean context besides the noisy tokens, so they are longer than the samples."""
    write_llada2(tmp_path, vocab_size=2048, torch_dtype="float32")
    state = State()
    state.model = load_model(tmp_path, torch.float32)
    padding = torch.ones_like(windows)
    padding[1, 12:] = 0
    state.data.calib = [{"input_ids": windows, "attention_mask": padding}]
    modifier = SinkAwareWandaModifier(sparsity=0.5, **QUICK)
    modifier.on_initialize(state)
    modifier.on_calibration_start(state, None)
    for name, module in state.model.model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert float((module.weight == 0).float().mean()) == 0.5, name
