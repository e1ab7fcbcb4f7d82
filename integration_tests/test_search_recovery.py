"""`search_recovery_steps`: candidates of a search are recovered for a few steps before they are measured."""

import pytest
import torch
from llmcompressor.core import reset_session
from loguru import logger

from sinkprune_plugin.diffusion import resolve_diffusion, timestep_grid
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model
from sinkprune_plugin.models.decoder_blocks import find_decoder_blocks
from sinkprune_plugin.modifiers import block_fit, block_recovery, finalist_recovery
from sinkprune_plugin.modifiers.block_influence import skipped
from sinkprune_plugin.modifiers.calibration import CalibrationBatch
from sinkprune_plugin.modifiers.finalist_recovery import STEP_PASSES, FinalistFit, FinalistRecovery
from sinkprune_plugin.modifiers.fit_plan import FitPlan
from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot
from sinkprune_plugin.modifiers.prediction_distance import PredictionDistance, scored_passes
from sinkprune_plugin.modifiers.replaced_forward import forward_replaced, linear_with
from sinkprune_plugin.modifiers.structured import SinkAwareStructuredModifier
from sinkprune_plugin.modifiers.trajectory import TrajectoryCorruption
from sinkprune_plugin.pruning import search_rounds

GRID = timestep_grid(4, 1)
EPS = 1e-3
GONE = 4


@pytest.fixture
def setting(model, golden_windows):
    """Distance on three windows at four timesteps, recovery on the same windows with other noise, and a candidate.

    In the candidate every Linear has lost the smaller half of each row, and block 4 is left out.
    """
    spec = resolve_diffusion(model.config)
    valid = torch.ones(1, 64, dtype=torch.bool)
    valid[:, 50:] = False
    batches = [CalibrationBatch(index, golden_windows[index : index + 1, :64], None) for index in range(2)]
    batches.append(CalibrationBatch(2, golden_windows[2:3, :64], valid))
    _, blocks = find_decoder_blocks(model)
    passes = scored_passes(batches, GRID, TrajectoryCorruption(spec, 0, EPS), spec, EPS)
    distance = PredictionDistance(model, blocks, passes, spec)
    candidate = {
        module: torch.where(W.abs() >= W.abs().median(dim=1, keepdim=True).values, W, 0.0)
        for module in blocks.modules()
        if isinstance(module, torch.nn.Linear)
        for W in [module.weight.detach()]
    }

    def weights(block):
        return None if block == GONE else {linear: candidate[linear] for linear in linears(blocks[block])}

    def recovery(steps):
        return FinalistRecovery(blocks, batches, GRID, TrajectoryCorruption(spec, 1, EPS), spec, EPS, steps)

    def plain(block):
        if block == GONE:
            return skipped(blocks[block])
        return forward_replaced([(each, linear_with(candidate[each], each)) for each in linears(blocks[block])])

    return model, distance, recovery, weights, plain


def linears(block):
    return [module for module in block.modules() if isinstance(module, torch.nn.Linear)]


def test_steps_that_change_nothing_give_the_distance_of_the_candidate_as_it_is(setting, monkeypatch):
    _, distance, recovery, weights, plain = setting
    still = block_fit.FitOptions(learning_rate=0.0, held_out=0.0, judged=False)
    monkeypatch.setattr(finalist_recovery, "FitOptions", lambda **_: still)
    for tokens, number in ((None, 0), (5 * 64, 1)):
        expected = distance.measure(plain, tokens, number)
        # The same operations in the same order.
        assert distance.measure_fitted(recovery(2).of(weights, number), tokens, number) == pytest.approx(expected)
    assert expected > 0.1


def test_a_recovery_brings_the_candidate_closer_and_leaves_the_dense_model_as_it_was(setting, monkeypatch):
    model, distance, recovery, weights, plain = setting
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fitted = []
    original = FinalistFit._fit

    def watched(self, block, module, given, passes):
        found = original(self, block, module, given, passes)
        fitted.extend((given[linear], weight) for linear, weight in found.items())
        return found

    monkeypatch.setattr(FinalistFit, "_fit", watched)
    values = [distance.measure(plain), *(distance.measure_fitted(recovery(n).of(weights, 0)) for n in (2, 10, 2))]
    # More steps bring it closer, each time by more than rounding could.
    assert values[0] > 1.05 * values[1] > 1.05 * values[2]
    assert values[1] == values[3], "the same candidate, steps and round give the same value"
    assert values[1] != distance.measure_fitted(recovery(2).of(weights, 1)), "another round takes other passes"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    # Seven Linears in each of the five blocks that are there, four times.
    assert len(fitted) == 7 * 5 * 4
    for given, weight in fitted:
        assert not weight[given == 0].view(torch.int32).any()
        assert not torch.equal(given, weight)


def test_it_is_blockwise_recovery_and_then_the_distance(setting, monkeypatch):
    """For a candidate that has all blocks, whose pruned weights are in a model of its own."""
    model, distance, recovery, weights, _ = setting
    whole = lambda block: {each: each.weight.detach().clone() * 0.9 for each in linears(blocks[block])}  # noqa: E731
    _, blocks = find_decoder_blocks(model)
    fit = recovery(2).of(lambda block: weights(block) or whole(block), 0)
    value = distance.measure_fitted(fit)

    pruned = load_model(EMBEDDED_MODEL, torch.float32)
    _, other = find_decoder_blocks(pruned)
    with torch.no_grad():
        for index, block in enumerate(other):
            for mine, weight in zip(linears(block), (weights(index) or whole(index)).values(), strict=True):
                mine.weight.copy_(weight)
    plan = FitPlan(tuple(map(tuple, fit._steps)), ()), dict(fit._pass_weights)
    monkeypatch.setattr(block_recovery, "_plan", lambda *_: plan)
    options = block_fit.FitOptions(held_out=0.0, judged=False)
    block_recovery.fit_blocks(pruned, model.state_dict(), fit.passes, 1, options, progress=False)

    def recovered(block):
        pairs = zip(linears(blocks[block]), linears(other[block]), strict=True)
        return forward_replaced([(each, linear_with(fitted.weight.detach(), each)) for each, fitted in pairs])

    # The same operations; hidden states of two streams in another order of passes.
    assert value == pytest.approx(distance.measure(recovered), rel=1e-5)


def test_each_step_takes_the_next_passes(setting):
    _, _, recovery, weights, _ = setting
    whole = recovery(3)
    first, second = whole.of(weights, 0), whole.of(weights, 1)
    order = [place for step in first._steps for _, place in step]
    assert [len(step) for step in first._steps] == [STEP_PASSES] * 3
    # Twelve passes, so that each comes twice in 24.
    assert sorted(order) == sorted(2 * list(range(12)))
    assert len(first.passes) == 12
    one = recovery(1)
    taken = [[each.inputs["input_ids"] for each in one.of(weights, number).passes] for number in (0, 1, 3)]
    assert [len(each) for each in taken] == [8, 8, 8]
    assert not all(torch.equal(a, b) for a, b in zip(taken[0], taken[1], strict=True))
    # Three rounds take 24 passes, after which they begin again.
    assert all(torch.equal(a, b) for a, b in zip(taken[0], taken[2], strict=True))
    assert len(second.passes) == 12


def test_a_search_over_widths_with_recovery(model, tokenizer, golden_windows, monkeypatch):
    for name, value in (("OFFSPRING", 4), ("SECOND", 2), ("LAST", 1)):
        monkeypatch.setattr(search_rounds, name, value)
    lines, spent = [], []
    original = PredictionDistance.measure_fitted

    def watched(self, fitting, tokens, number):
        spent.append((len(fitting.passes), tokens, number))
        return original(self, fitting, tokens, number)

    monkeypatch.setattr(PredictionDistance, "measure_fitted", watched)
    handle = logger.add(lines.append, level="INFO", format="{message}")
    fields = {"mlp_channels": 0.5, "attention_heads": 1, "blocks": 1, "allocation": "search"}
    windows = golden_windows[:1, :96]
    # Ten passes of 96 tokens, eight of them in the last stage: 4 + 2 · 4 + 2 · 8, and twice 5 · 8 + 8 for the recovery.
    modifier = SinkAwareStructuredModifier(**fields, search_budget=(28 + 96) * 96, search_recovery_steps=1)
    run_oneshot(model, tokenizer, modifier, windows)
    logger.remove(handle)
    assert spent == [(8, 8 * 96, 0)] * 2
    (line,) = [line for line in lines if "widths chosen by search" in line]
    assert f"search: {124 * 96} forward tokens in 1 rounds, 1 recovery steps before a choice, seed 0" in line
    assert any("on 8 candidates, 2 of them recovered before they are measured" in each for each in lines)
    # The saved recipe gives the same model, without a search.
    assert modifier.allocation == "uniform"
    reset_session()
    again = load_model(EMBEDDED_MODEL, torch.float32)
    saved = {name: getattr(modifier, name) for name in ("mlp_channels", "attention_heads", "blocks")}
    run_oneshot(again, tokenizer, SinkAwareStructuredModifier(**saved), windows)
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }


def test_too_small_a_budget_is_refused_before_anything_is_solved(model, tokenizer, golden_windows, monkeypatch):
    monkeypatch.setattr(SinkAwareStructuredModifier, "_solve_all_levels", lambda *_: pytest.fail("levels were solved"))
    fields = {"mlp_channels": 0.5, "allocation": "search", "search_budget": 6000, "search_recovery_steps": 4}
    with pytest.raises(ValueError, match="budget of 6000 tokens isn't enough for one round, which takes"):
        run_oneshot(model, tokenizer, SinkAwareStructuredModifier(**fields), golden_windows[:1, :96])
