"""Parity with the published program (VILA-Lab/Sink-Aware-Pruning, commit 6ef32c9), run on tiny-llada in float32.

Its recorded corruption is fed to our modifiers, so that what remains is the order of float operations. Mismatch classes
that are left, each of them looked at:

- *Ties and near ties.* A score within rounding of its row's threshold falls to either side. The published program takes
  norms of scaled rows, ours sums weighted squares: 1e-7 relative.
- *Cascades of SparseGPT.* One flipped weight changes the updates of all columns to its right and so the scores of later
  blocks and layers. Hence 99.5 % instead of 99.99 %, and less for 2:4 (see there).
- *One weight a block of columns.* The published program and llm-compressor prune everything up to and including the
  score at rank floor(numel · sparsity), ours exactly that many: one weight in 24,576 for 192 rows of 128 columns.
- *Hessian scale.* Theirs is a running mean, ours a sum that is scaled once: rounding again.
"""

import numpy as np
import pytest
import torch
from golden_data import GOLDEN
from safetensors.torch import load_file

from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model
from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot, stock_modifier
from sinkprune_plugin.modifiers.sparsegpt import SinkAwareSparseGPTModifier
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier


class RecordedCorruption:
    """The golden run's noisy ids, looked up by the clean sample."""

    def __init__(self, name, windows):
        noisy = load_file(GOLDEN / f"sinks_{name}.safetensors")["noisy_ids"].long()
        self.table = {tuple(row.tolist()): noisy[index] for index, row in enumerate(windows)}

    def __call__(self, batch, step_index, timestep):
        return torch.stack([self.table[tuple(row.tolist())][step_index] for row in batch.input_ids])


def golden_masks(name):
    """Pruned positions, (rows, columns) bool, by weight name; the file packs them little-endian along the columns."""
    return {
        key: torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, bitorder="little")).bool()
        for key, packed in load_file(GOLDEN / f"mask_{name}.safetensors").items()
    }


def agreement(model, masks):
    assert masks
    same = total = 0
    state = model.state_dict()
    for name, expected in masks.items():
        pruned = state[name] == 0
        same += int((pruned == expected[:, : pruned.shape[1]]).sum())
        total += pruned.numel()
    return same / total


def sink_aware(cls, corruption, **fields):
    modifier = cls(**fields)
    modifier._corruption = corruption
    return modifier


def test_wanda_masks_and_perplexity(model, tokenizer, golden_windows, golden_perplexity, evaluate):
    corruption = RecordedCorruption("sink_wanda_50", golden_windows)
    run_oneshot(model, tokenizer, sink_aware(SinkAwareWandaModifier, corruption, sparsity=0.5), golden_windows)
    assert agreement(model, golden_masks("sink_wanda_50")) >= 0.9999
    assert evaluate(model) == pytest.approx(golden_perplexity["sink_wanda_50"]["elbo_ppl"], rel=0.01)


def test_wanda_activation_norms(model, tokenizer, golden_windows, monkeypatch):
    """a_j = Σ over samples and timesteps of ‖(1 − m) ⊙ X_j‖, however many passes it takes."""
    seen = {}
    prune = SinkAwareWandaModifier._prune

    def spy(self, targets, leaders):
        seen.update({target.name: self._norms[leaders[target.name]].norms().clone() for target in targets})
        prune(self, targets, leaders)

    monkeypatch.setattr(SinkAwareWandaModifier, "_prune", spy)
    corruption = RecordedCorruption("sink_wanda_50", golden_windows)
    run_oneshot(model, tokenizer, sink_aware(SinkAwareWandaModifier, corruption, sparsity=0.5), golden_windows)
    expected = load_file(GOLDEN / "activation_norms_sink_wanda_50.safetensors")
    assert seen.keys() == expected.keys()
    for name, norms in expected.items():
        # Float32 forward passes that differ in the order of their sums: 1e-6 a layer, 1e-4 is far above and far below
        # what a wrong mask would do (one sink row more or less moves a norm by 1e-2).
        torch.testing.assert_close(seen[name].float(), norms, rtol=1e-4, atol=0)


def prune_sparsegpt(model, tokenizer, windows, **fields):
    corruption = RecordedCorruption("sink_sparsegpt_50", windows)
    run_oneshot(
        model, tokenizer, sink_aware(SinkAwareSparseGPTModifier, corruption, calibrate_on="clean", **fields), windows
    )


def test_sparsegpt_masks_and_perplexity(model, tokenizer, golden_windows, golden_perplexity, evaluate):
    prune_sparsegpt(model, tokenizer, golden_windows, sparsity=0.5)
    assert evaluate(model) == pytest.approx(golden_perplexity["sink_sparsegpt_50"]["elbo_ppl"], rel=0.01)
    assert agreement(model, golden_masks("sink_sparsegpt_50")) >= 0.995


def test_sparsegpt_2of4_masks_and_perplexity(tokenizer, golden_windows, golden_perplexity, evaluate):
    """2:4 decides group by group with all updates so far, so a flipped near tie sets off others all along its row.

    Through six blocks that is chaos: this program agrees with itself on 98.55 % only, when it runs with two threads
    instead of one or on weights that differ by 1e-7. So block 0, where there is no cascade from earlier blocks, is held
    to 99.5 %, and the whole to what the program's own rounding noise leaves, measured here.
    """
    masks = golden_masks("sink_sparsegpt_2of4")
    model = load_model(EMBEDDED_MODEL, torch.float32)
    prune_sparsegpt(model, tokenizer, golden_windows, mask_structure="2:4")
    assert evaluate(model) == pytest.approx(golden_perplexity["sink_sparsegpt_2of4"]["elbo_ppl"], rel=0.01)
    first = {name: mask for name, mask in masks.items() if ".blocks.0." in name}
    assert agreement(model, first) >= 0.995

    nudged = load_model(EMBEDDED_MODEL, torch.float32)
    embedding = nudged.get_input_embeddings().weight
    with torch.no_grad():
        embedding.mul_(1 + 1e-7 * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0)))
    prune_sparsegpt(nudged, tokenizer, golden_windows, mask_structure="2:4")
    itself = {name: model.state_dict()[name] == 0 for name in masks}
    # 0.003: how much this noise floor itself varies from nudge to nudge.
    assert agreement(model, masks) >= agreement(nudged, itself) - 0.003


def test_sparsegpt_weights_beyond_the_mask(model, tokenizer, golden_windows):
    prune_sparsegpt(model, tokenizer, golden_windows, sparsity=0.5)
    state = model.state_dict()
    for name, expected in load_file(GOLDEN / "weights_block0_sink_sparsegpt_50.safetensors").items():
        both = (state[name] != 0) & (expected != 0)
        # Block 0 has no cascade from earlier blocks. Where both kept a weight it must be the same update; a flip in the
        # same row moves its neighbours, so the median rather than the maximum is held to rounding.
        difference = (state[name] - expected)[both].abs() / expected[both].abs()
        assert difference.median() < 1e-4, name


@pytest.mark.parametrize(
    ("modifier", "name", "structure"),
    [
        ("WandaPruningModifier", "wanda_50", "0:0"),
        ("WandaPruningModifier", "wanda_2of4", "2:4"),
        ("SparseGPTModifier", "sparsegpt_50", "0:0"),
    ],
)
def test_stock_modifiers_on_our_model_class(
    model, tokenizer, golden_windows, golden_perplexity, evaluate, modifier, name, structure
):
    run_oneshot(model, tokenizer, stock_modifier(modifier, 0.5, structure), golden_windows)
    assert evaluate(model) == pytest.approx(golden_perplexity[name]["elbo_ppl"], rel=0.01)
    assert agreement(model, golden_masks(name)) >= 0.995
    head = model.get_output_embeddings().weight
    assert (head == 0).sum() == 0
