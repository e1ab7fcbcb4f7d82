"""The divergence of a candidate's predictions from the dense model's."""

import contextlib

import pytest
import torch

from sinkprune_plugin.diffusion import resolve_diffusion, timestep_grid
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.decoder_blocks import find_decoder_blocks
from sinkprune_plugin.modifiers.calibration import CalibrationBatch
from sinkprune_plugin.modifiers.prediction_distance import PredictionDistance, kept_prediction_bytes, scored_passes
from sinkprune_plugin.modifiers.trajectory import TrajectoryCorruption

GRID = timestep_grid(4, 1)
EPS = 1e-3


@pytest.fixture
def setting(model, golden_windows):
    """Model, blocks, spec, and passes of three windows, one of them padded, at four timesteps."""
    spec = resolve_diffusion(model.config)
    valid = torch.ones(1, 64, dtype=torch.bool)
    valid[:, 50:] = False
    batches = [CalibrationBatch(index, golden_windows[index : index + 1, :64], None) for index in range(2)]
    batches.append(CalibrationBatch(2, golden_windows[2:3, :64], valid))
    passes = scored_passes(batches, GRID, TrajectoryCorruption(spec, 0, EPS), spec, EPS)
    _, blocks = find_decoder_blocks(model)
    return model, blocks, spec, passes


@contextlib.contextmanager
def halved(block):
    """The block's weights, halved for a while."""
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(0.5)
    yield
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(before[name])


def plain(model, passes, install, shift=0):
    """The divergence from its definition: whole forward passes in turn."""
    total, tokens = 0.0, 0
    for one in passes:
        with torch.no_grad():
            dense = model(**one.each.inputs).logits.double().log_softmax(-1)
            with install():
                other = model(**one.each.inputs).logits.double().log_softmax(-1)
        for row, position in one.masked.nonzero().tolist():
            p, q = dense[row, max(position - shift, 0)], other[row, max(position - shift, 0)]
            total += one.weight * float((p.exp() * (p - q)).sum())
        tokens += int((one.each.row_weights > 0).sum())
    return total / tokens


def installer(blocks, chosen):
    return lambda index: halved(blocks[index]) if index == chosen else contextlib.nullcontext()


@pytest.mark.parametrize("shift", [0, 1])
def test_equals_the_definition_where_all_tokens_are_kept(setting, shift, monkeypatch):
    model, blocks, spec, passes = setting
    monkeypatch.setattr(type(spec), "logit_shift", shift)
    distance = PredictionDistance(model, blocks, passes, spec, top_k=spec.vocab_size - 1)
    expected = plain(model, passes, lambda: halved(blocks[2]), shift)
    # float32 log-probabilities of 2048 tokens.
    assert distance.measure(installer(blocks, 2)) == pytest.approx(expected, rel=1e-4)
    assert expected > 0.01


def test_the_dense_model_has_no_distance_and_is_left_as_it_was(setting):
    model, blocks, spec, passes = setting
    distance = PredictionDistance(model, blocks, passes, spec)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    distance.measure(installer(blocks, 0))
    assert abs(distance.measure(lambda _index: contextlib.nullcontext())) < 1e-6
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model._forward_hooks


def test_fewer_tokens_kept_give_a_lower_bound_that_closes(setting):
    model, blocks, spec, passes = setting
    found = []
    for top_k in (1, 16, 256, spec.vocab_size - 1):
        distance = PredictionDistance(model, blocks, passes, spec, top_k=top_k)
        found.append(distance.measure(installer(blocks, 1)))
        kept = sum(each.ids.nbytes + each.log_probabilities.nbytes for each in distance._dense.values())
        # The expected number of masked tokens; 3 · 64 · 2.5 = 480 of them are binomially spread by 4 %.
        assert kept == pytest.approx(kept_prediction_bytes(3 * 64 - 14, GRID, top_k), rel=0.15)
    assert found == sorted(found)
    assert found[1] > 0.5 * found[3]


def test_a_stretch_of_passes_mixes_windows_and_timesteps_and_moves_on(setting):
    model, blocks, spec, passes = setting
    assert [round(one.weight, 2) for one in passes[:4]] == [3.99, 2.0, 1.33, 2.0]
    assert len({one.each.source for one in passes[:3]}) == 3
    distance = PredictionDistance(model, blocks, passes, spec)
    assert distance.tokens == 12 * 64
    assert distance._choose(64 * 5 - 1, 0) == [0, 1, 2, 3, 4]
    assert distance._choose(64 * 5, 1) == [5, 6, 7, 8, 9]
    assert distance._choose(64 * 5, 2) == [0, 1, 2, 10, 11]
    assert distance._choose(None, 7) == distance._choose(10**9, 7) == list(range(12))
    # Only what was measured is kept.
    distance.measure(installer(blocks, 0), 64 * 2, 1)
    assert sorted(distance._dense) == [2, 3]


def test_logits_that_are_not_finite_are_refused(setting):
    model, blocks, spec, passes = setting
    distance = PredictionDistance(model, blocks, passes, spec)
    distance.measure(lambda _index: contextlib.nullcontext())
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = torch.nan
    with pytest.raises(UsageError, match="calibration batch 0 hold NaN"):
        distance.measure(lambda _index: contextlib.nullcontext(), 64)


def test_noise_that_masks_nothing_is_refused(model):
    spec = resolve_diffusion(model.config)
    batch = CalibrationBatch(0, torch.tensor([[5]]), torch.tensor([[False]]))
    with pytest.raises(UsageError, match="masks no token"):
        scored_passes([batch], GRID, TrajectoryCorruption(spec, 0, EPS), spec, EPS)
