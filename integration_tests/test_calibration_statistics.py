"""The statistics of both modifiers against a plain reference: whole forward passes, attention and sums by hand.

The reference has no blocks, sweeps or budgets. Its attention is an explicit softmax, its sums are in float64.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from sinkprune_plugin.diffusion import resolve_diffusion
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model
from sinkprune_plugin.modifiers import wanda as wanda_base
from sinkprune_plugin.modifiers.calibration import collect_batches
from sinkprune_plugin.modifiers.sparsegpt import SinkAwareSparseGPTModifier
from sinkprune_plugin.modifiers.trajectory import TrajectoryCorruption
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier

GRID = [0.25, 0.5, 0.75, 1.0]
FIELDS = {"sparsity": 0.5, "diffusion_steps": 4, "sample_interval": 1}
POWER = {"uniform": 0, "inverse": 1, "inverse_square": 2}
WEIGHTINGS = sorted(POWER)


@pytest.fixture(scope="module")
def loader(golden_windows):
    """Two batches, one of them padded on the right."""

    def collate(rows):
        ids = torch.ones(len(rows), max(map(len, rows)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)], mask[index, : len(row)] = row, 1
        return {"input_ids": ids, "attention_mask": mask}

    rows = [golden_windows[0, :48], golden_windows[1, :40], golden_windows[2, :48], golden_windows[3, :48]]
    return DataLoader(rows, batch_size=2, collate_fn=collate)


class Reference:
    """Inputs of every Linear and soft sink masks of the dense model, for every batch and timestep."""

    def __init__(self, loader):
        self.model = load_model(EMBEDDED_MODEL, torch.float32)
        self.batches = collect_batches(loader)
        corrupt = TrajectoryCorruption(resolve_diffusion(self.model.config), 0, 1e-3)
        self.noisy = [[corrupt(batch, step, t) for step, t in enumerate(GRID)] for batch in self.batches]
        self.masks = [
            [self.sinks(self.mass(ids, batch.valid), batch.valid) for ids in noisy]
            for batch, noisy in zip(self.batches, self.noisy, strict=True)
        ]

    def mass(self, ids, valid):
        """(B, T): probabilities summed over layers, heads and real queries, at real keys."""
        total = torch.zeros(ids.shape, dtype=torch.float64)
        real = torch.ones(ids.shape, dtype=torch.bool) if valid is None else valid

        def attention(query, key, value, *_args, **_kwargs):
            scores = query.double() @ key.double().transpose(-1, -2) / math.sqrt(query.shape[-1])
            probabilities = scores.masked_fill(~real[:, None, None, :], -math.inf).softmax(dim=-1)
            total.add_((probabilities * real[:, None, :, None]).sum(dim=(1, 2)))
            return (probabilities @ value.double()).to(query.dtype)

        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(F, "scaled_dot_product_attention", attention)
            self.model(input_ids=ids, attention_mask=None if valid is None else valid.long())
        assert (total > 0).any()
        return total

    @staticmethod
    def sinks(mass, valid):
        masks = torch.zeros_like(mass)
        for row in range(len(mass)):
            real = slice(None) if valid is None else valid[row]
            of_row = mass[row][real]
            threshold = of_row.mean() + 2.0 * of_row.std(correction=0)
            masks[row][real] = torch.sigmoid(5.0 * (of_row - threshold))
        return masks

    def inputs(self, ids, valid, names, model=None):
        """name → (B, T, C) float64."""
        model = model or self.model
        seen, handles = {}, []
        for name in names:
            handles.append(
                model.get_submodule(name).register_forward_pre_hook(
                    lambda _module, args, name=name: seen.update({name: args[0].double()})
                )
            )
        with torch.no_grad():
            model(input_ids=ids, attention_mask=None if valid is None else valid.long())
        for handle in handles:
            handle.remove()
        return seen

    def cases(self, names, model=None):
        """(inputs, token weights (B, T), t) for every batch and timestep."""
        for batch, noisy, masks in zip(self.batches, self.noisy, self.masks, strict=True):
            for t, ids, mask in zip(GRID, noisy, masks, strict=True):
                weights = 1 - mask
                if batch.valid is not None:
                    weights = weights * batch.valid
                yield self.inputs(ids, batch.valid, names, model), weights, t


@pytest.fixture(scope="module")
def reference(loader):
    return Reference(loader)


def run(cls, loader, tokenizer, drifts=None, **fields):
    """Run a modifier and keep its statistics: leader → tensor, as they are when they are handed over."""
    from llmcompressor import oneshot

    seen = {}
    drifts = {} if drifts is None else drifts

    class Spy(cls):
        def _take_statistics(self, leader):
            statistics = super()._take_statistics(leader)
            seen[leader], *drift = [each.clone().double() for each in statistics]
            drifts.update(dict.fromkeys([leader], drift[0]) if drift else {})
            return statistics

    model = load_model(EMBEDDED_MODEL, torch.float32)
    modifier = Spy(**FIELDS, **fields)
    oneshot(model=model, tokenizer=tokenizer, dataset=loader, recipe=[modifier])
    return seen, model


def wanda_sums(reference, leaders, weighting, aggregation):
    sums = {}
    for inputs, weights, t in reference.cases(leaders):
        for name, x in inputs.items():
            squares = (weights.unsqueeze(-1) * x).square().sum(dim=1) / t ** POWER[weighting]
            terms = squares.sqrt() if aggregation == "sum_of_norms" else squares
            sums[name] = sums.get(name, 0) + terms.sum(dim=0)
    return sums


# Float32 forward passes and masks against a float64 reference: 1e-6 per layer, and the sigmoid of 5 · mass multiplies
# the rounding of the mass by at most 5/4. A forgotten weight of t = 1/4 would be a factor of 2 to 16.
TOLERANCE = {"rtol": 2e-4, "atol": 1e-6}


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("aggregation", ["sum_of_norms", "sum_of_squares"])
def test_wanda_sums_equal_a_plain_loop(weighting, budget, aggregation, reference, loader, tokenizer, monkeypatch):
    """Every weighting, with and without memory for one sweep."""
    if budget is not None:
        monkeypatch.setattr(wanda_base, "ONE_SWEEP_BYTES", budget)
    seen, _ = run(SinkAwareWandaModifier, loader, tokenizer, timestep_weighting=weighting, norm_aggregation=aggregation)
    expected = wanda_sums(reference, list(seen), weighting, aggregation)
    assert len(seen) == 4 * 6
    for name, sums in expected.items():
        torch.testing.assert_close(seen[name], sums, **TOLERANCE)


@pytest.mark.parametrize("fields", [{}, {"timestep_weighting": "inverse_square"}, {"sink_scope": "transient"}])
def test_wanda_prunes_the_same_weights_in_one_sweep_and_in_two(fields, loader, tokenizer, monkeypatch):
    _, one = run(SinkAwareWandaModifier, loader, tokenizer, **fields)
    monkeypatch.setattr(wanda_base, "ONE_SWEEP_BYTES", 0)
    _, two = run(SinkAwareWandaModifier, loader, tokenizer, **fields)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_reconstructed_weights_have_wandas_mask_and_less_error(reference, loader, tokenizer):
    _, masked = run(SinkAwareWandaModifier, loader, tokenizer)
    _, solved = run(SinkAwareWandaModifier, loader, tokenizer, reconstruct=True)
    dense = reference.model.state_dict()
    names = [name for name, weight in dense.items() if ".blocks." in name and weight.dim() == 2]
    rows = {}
    for inputs, weights, _ in reference.cases([name.removesuffix(".weight") for name in names]):
        for name, x in inputs.items():
            rows.setdefault(f"{name}.weight", []).append((weights.unsqueeze(-1) * x).flatten(0, 1))
    for name in names:
        before, after = masked.state_dict()[name], solved.state_dict()[name]
        assert torch.equal(before == 0, after == 0), name
        X = torch.cat(rows[name])
        errors = [((W - dense[name]).double() @ X.T).square().sum() for W in (before, after)]
        # The least squares on that mask are far below what Wanda leaves.
        assert errors[1] < 0.7 * errors[0], name


def test_the_aggregation_follows_the_weighting_unless_it_is_given():
    assert SinkAwareWandaModifier(sparsity=0.5).norm_aggregation == "sum_of_norms"
    assert SinkAwareWandaModifier(sparsity=0.5, timestep_weighting="inverse").norm_aggregation == "sum_of_squares"
    given = SinkAwareWandaModifier(sparsity=0.5, timestep_weighting="inverse", norm_aggregation="sum_of_norms")
    assert given.norm_aggregation == "sum_of_norms"


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_propagated_wanda_sees_pruned_blocks(weighting, reference, loader, tokenizer):
    seen, pruned = run(SinkAwareWandaModifier, loader, tokenizer, timestep_weighting=weighting, propagate_error=True)
    model = _pruned_up_to(pruned, 3)
    leaders = [name for name in seen if ".blocks.3." in name]
    assert len(leaders) == 4
    aggregation = "sum_of_norms" if weighting == "uniform" else "sum_of_squares"
    sums = {}
    for inputs, weights, t in reference.cases(leaders, model):
        for name, x in inputs.items():
            squares = (weights.unsqueeze(-1) * x).square().sum(dim=1) / t ** POWER[weighting]
            terms = squares.sqrt() if aggregation == "sum_of_norms" else squares
            sums[name] = sums.get(name, 0) + terms.sum(dim=0)
    for name, expected in sums.items():
        torch.testing.assert_close(seen[name], expected, **TOLERANCE)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_sparsegpt_along_the_trajectory(weighting, reference, loader, tokenizer):
    seen, pruned = run(SinkAwareSparseGPTModifier, loader, tokenizer, timestep_weighting=weighting)
    for block in (0, 4):
        _compare_hessians(
            seen,
            block,
            reference.cases([n for n in seen if f".blocks.{block}." in n], _pruned_up_to(pruned, block)),
            POWER[weighting],
        )


def test_sparsegpt_on_clean_samples(reference, loader, tokenizer):
    """Clean inputs, rows weighted with one minus the mean of the noisy masks."""
    seen, pruned = run(SinkAwareSparseGPTModifier, loader, tokenizer, calibrate_on="clean")
    for block in (0, 4):
        names, model = [n for n in seen if f".blocks.{block}." in n], _pruned_up_to(pruned, block)
        cases = []
        for batch, masks in zip(reference.batches, reference.masks, strict=True):
            weights = 1 - torch.stack(masks).mean(dim=0)
            weights = weights if batch.valid is None else weights * batch.valid
            cases.append((reference.inputs(batch.input_ids, batch.valid, names, model), weights, 1.0))
        _compare_hessians(seen, block, cases, 0)


def test_the_drift_is_that_of_the_dense_model(reference, loader, tokenizer):
    """Σ w² (x̄ − x) xᵀ / t with x̄ of the dense model and x of the one whose earlier blocks are pruned."""
    drifts = {}
    seen, pruned = run(
        SinkAwareSparseGPTModifier, loader, tokenizer, drifts, target="dense", timestep_weighting="inverse"
    )
    assert drifts.keys() == seen.keys()
    assert all(not drifts[name].any() for name in drifts if ".blocks.0." in name)
    names, model = [name for name in seen if ".blocks.3." in name], _pruned_up_to(pruned, 3)
    sums = {}
    for (dense, weights, t), (inputs, _, _) in zip(reference.cases(names), reference.cases(names, model), strict=True):
        for name, x in inputs.items():
            rows, difference = ((weights.unsqueeze(-1) * each).flatten(0, 1) for each in (x, dense[name] - x))
            sums[name] = sums.get(name, 0) + difference.T @ rows / t
    for name, expected in sums.items():
        scale = float(seen[name].diagonal().max())
        torch.testing.assert_close(drifts[name], expected, rtol=2e-4, atol=2e-5 * scale)
        assert expected.abs().max() > 100 * 2e-5 * scale, "nothing drifted that the tolerance could see"


def test_sequential_sees_the_pruned_linears_before_it_in_the_block(reference, loader, tokenizer):
    seen, pruned = run(SinkAwareSparseGPTModifier, loader, tokenizer, target="dense", within_block="sequential")
    # The MLP's output is the last of block 0: its input comes from the block with everything else pruned.
    model = _pruned_up_to(pruned, 1)
    name = next(n for n in seen if n.endswith("blocks.0.ff_out"))
    _compare_hessians(seen, 0, reference.cases([name], model), 0, count=1)


def _pruned_up_to(pruned, block):
    """The dense model with the pruned weights of the blocks before one."""
    model = load_model(EMBEDDED_MODEL, torch.float32)
    with torch.no_grad():
        for ours, theirs in zip(
            model.model.transformer.blocks[:block], pruned.model.transformer.blocks[:block], strict=True
        ):
            ours.load_state_dict(theirs.state_dict())
    return model


def _compare_hessians(seen, block, cases, power, count=4):
    sums = {}
    for inputs, weights, t in cases:
        for name, x in inputs.items():
            rows = (weights.unsqueeze(-1) * x).flatten(0, 1)
            sums[name] = sums.get(name, 0) + rows.T @ rows / t**power
    assert len(sums) == count
    for name, expected in sums.items():
        # Off the diagonal large terms cancel, so the yardstick is the size of the matrix.
        scale = float(expected.diagonal().max())
        torch.testing.assert_close(
            seen[name], expected, rtol=2e-4, atol=2e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
