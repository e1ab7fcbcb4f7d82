"""`allocation`: lists, equal marginal error and search, through oneshot()."""

import re

import pytest
import torch
import yaml
from golden_data import RECIPES
from llmcompressor import oneshot
from llmcompressor.core import active_session, reset_session
from loguru import logger
from pydantic import ValidationError

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model
from sinkprune_plugin.models.decoder_blocks import block_linears
from sinkprune_plugin.models.llada import LLaDAConfig, LLaDAModelLM
from sinkprune_plugin.modifiers import allocating_base
from sinkprune_plugin.modifiers.admm import SinkAwareADMMModifier
from sinkprune_plugin.modifiers.level_database import CACHE_BYTES, LevelDatabase
from sinkprune_plugin.modifiers.oneshot_flow import calibration_dataset, run_oneshot
from sinkprune_plugin.modifiers.sparsegpt import SinkAwareSparseGPTModifier
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier
from sinkprune_plugin.pruning import level_grid, search_rounds

ALL = [SinkAwareWandaModifier, SinkAwareSparseGPTModifier, SinkAwareADMMModifier]
# Two windows of 64 tokens at two timesteps, so four passes. A round of the small search measures 4 candidates on one of
# them, 2 on two, and 2 on all.
QUICK = {"diffusion_steps": 4, "sample_interval": 2}
ONE_ROUND = (4 * 1 + 2 * 2 + 2 * 4) * 64
# With a recovery step, which goes through 8 passes of 64 tokens and counts each five times, the last two go through all
# four passes of the dense model as well.
RECOVERED_ROUND = ONE_ROUND + 2 * (5 * 8 + 4) * 64
# The solver's quality is tested elsewhere; here it solves 42 Linears at five levels.
FAST = {SinkAwareADMMModifier: {"iterations": 2, "gradual_iterations": 1, "refine": "none"}}
LISTED = [0.8, 0.8, 0.7, 0.7, 0.65, 0.55]


@pytest.fixture
def small_search(monkeypatch):
    """Levels 0.8, 0.775, … 0.7 at 75 %, instead of eleven, and a quarter of the candidates."""
    monkeypatch.setattr(level_grid, "LEVELS_ASIDE", 2)
    monkeypatch.setattr(search_rounds, "OFFSPRING", 4)
    monkeypatch.setattr(search_rounds, "SECOND", 2)
    monkeypatch.setattr(search_rounds, "LAST", 1)


@pytest.fixture
def windows(golden_windows):
    return golden_windows[:2, :64]


def zeros_by_block(model):
    zeros, sizes = [0] * 6, [0] * 6
    for name, module in block_linears(model).items():
        block = int(name.split(".blocks.")[1].split(".")[0])
        zeros[block] += int((module.weight == 0).sum())
        sizes[block] += module.weight.numel()
    return [zero / size for zero, size in zip(zeros, sizes, strict=True)], sum(zeros) / sum(sizes)


def pruned_by(modifier, tokenizer, windows):
    reset_session()
    model = load_model(EMBEDDED_MODEL, torch.float32)
    run_oneshot(model, tokenizer, modifier, windows)
    return model


# Wanda removes floor(192 · s) or floor(512 · s) weights of each row, the others that of whole matrices.
def close(cls):
    return 0.006 if cls is SinkAwareWandaModifier else 1e-4


def test_a_list_is_the_same_in_allocation_and_in_sparsity(tokenizer, windows):
    models = [
        pruned_by(SinkAwareWandaModifier(**fields, **QUICK), tokenizer, windows)
        for fields in ({"sparsity": LISTED}, {"sparsity": 0.7, "allocation": LISTED}, {"allocation": LISTED})
    ]
    assert zeros_by_block(models[0])[0] == pytest.approx(LISTED, abs=0.006)
    for other in models[1:]:
        for (name, a), (_, b) in zip(block_linears(models[0]).items(), block_linears(other).items(), strict=True):
            assert torch.equal(a.weight, b.weight), name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 0.7001, "allocation": LISTED}, "allocation has a total sparsity of 0.7 over .* not the 0.7001"),
        ({"sparsity": 0.7, "allocation": [0.7] * 5}, "allocation has 5 values, but the model has 6"),
        (
            {"sparsity": 0.7, "allocation": "search", "targets": ["Linear", "re:.*transformer.ff_out$"]},
            "is outside the",
        ),
        ({"sparsity": 0.7, "allocation": "error", "targets": ["re:.*blocks.0.*"]}, "1 decoder block has targets"),
        ({"sparsity": 0.7, "allocation": "search", "search_budget": 100}, "100 tokens isn't enough for one round"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_the_first_pass(fields, message, model, tokenizer, windows):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []
    model.model.transformer.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(UsageError, match=message) as caught:
        run_oneshot(model, tokenizer, SinkAwareADMMModifier(**fields, **QUICK), windows)
    assert "\n" not in str(caught.value)
    assert not calls
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 0.5, "allocation": [0.5, 1.5]}, r"sparsity 1.5 is outside \(0, 1\)"),
        ({"sparsity": [0.5, 0.5], "allocation": [0.5, 0.5]}, "allocation a list spreads .* a list of sparsities fixes"),
        ({"mask_structure": "2:4", "allocation": "search"}, "allocation search .* mask_structure 2:4 fixes"),
        ({"mask_structure": "2:4", "allocation": [0.5, 0.6]}, "sparsity 0.6 contradicts mask_structure 2:4"),
        ({"sparsity": 0.5, "search_budget": 0}, "greater than 0"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        SinkAwareADMMModifier(**fields)


@pytest.mark.usefixtures("small_search")
@pytest.mark.parametrize("cls", ALL)
def test_error_gives_an_exact_total(cls, tokenizer, windows):
    modifier = cls(sparsity=0.75, allocation="error", **QUICK, **FAST.get(cls, {}))
    model = pruned_by(modifier, tokenizer, windows)
    of_blocks, total = zeros_by_block(model)
    assert sum(modifier.allocation) / 6 == pytest.approx(0.75, abs=1e-12)
    assert of_blocks == pytest.approx(modifier.allocation, abs=close(cls))
    assert total == pytest.approx(0.75, abs=close(cls))
    # Not all the same, and within the levels.
    assert max(modifier.allocation) - min(modifier.allocation) > 0.02
    assert 0.7 - 1e-9 <= min(modifier.allocation) <= max(modifier.allocation) <= 0.8 + 1e-9


@pytest.mark.usefixtures("small_search")
def test_errors_are_those_of_the_outputs(monkeypatch, tokenizer, windows):
    """Relative squared errors of a Linear's output, computed from the inputs themselves."""
    found, inputs, levels = {}, [], {}
    solve = SinkAwareADMMModifier._solve_levels

    def recording(self, engine, passes, by_block, receive, **options):
        levels.update(by_block)
        module = block_linears(engine.model)["model.transformer.blocks.2.ff_out"]

        def both(name, weights, errors, power):
            found[name] = (module.weight.clone(), weights, errors, power)
            receive(name, weights, errors, power)

        hook = module.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].detach()[0]))
        solve(self, engine, passes, by_block, both, **options)
        hook.remove()

    monkeypatch.setattr(SinkAwareADMMModifier, "_solve_levels", recording)
    # No sink is this far above the mean, so that every token counts 1.
    fields = {"sparsity": 0.75, "allocation": "error", "sink_std": 1e6, **QUICK, **FAST[SinkAwareADMMModifier]}
    pruned_by(SinkAwareADMMModifier(**fields), tokenizer, windows)
    W, weights, errors, power = found["model.transformer.blocks.2.ff_out"]
    x = torch.cat(inputs)
    expected = [float(((each - W) @ x.T).square().sum() / (W @ x.T).square().sum()) for each in weights]
    # Two orders of float32 sums.
    assert errors == pytest.approx(expected, rel=1e-3)
    assert power == pytest.approx(float((W @ x.T).square().sum()), rel=1e-3)
    assert errors == sorted(errors, reverse=True)
    assert [float((each == 0).float().mean()) for each in weights] == pytest.approx(list(levels[2]), abs=1e-4)


@pytest.mark.usefixtures("small_search")
@pytest.mark.parametrize("cls", ALL)
def test_search_gives_an_exact_total_and_a_recipe_with_its_provenance(cls, tokenizer, windows, tmp_path):
    modifier = cls(sparsity=0.75, allocation="search", search_budget=ONE_ROUND, **QUICK, **FAST.get(cls, {}))
    model = load_model(EMBEDDED_MODEL, torch.float32)
    lines = []
    sink = logger.add(lines.append, level="INFO", format="{message}")
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=calibration_dataset(windows),
        recipe=[modifier],
        num_calibration_samples=2,
        max_seq_length=64,
        output_dir=str(tmp_path / "out"),
    )
    logger.remove(sink)
    of_blocks, total = zeros_by_block(model)
    assert sum(modifier.allocation) / 6 == pytest.approx(0.75, abs=1e-12)
    assert of_blocks == pytest.approx(modifier.allocation, abs=close(cls))
    assert total == pytest.approx(0.75, abs=close(cls))
    [saved] = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text()).values()
    [fields] = [each[cls.__name__] for each in saved.values()]
    assert fields["sparsity"] == 0.75
    assert fields["allocation"] == modifier.allocation
    note = fields["allocation_note"]
    assert note.startswith(f"search: {ONE_ROUND} forward tokens in 1 rounds, seed 0, distance to the dense model's")
    best, uniform = map(float, re.search(r"predictions (\S+) nats per token \(uniform (\S+)\)", note).groups())
    assert 0 < best <= uniform
    assert any("search of at most 1,024 forward tokens on 8 candidates" in line for line in lines)
    # The saved recipe gives the same model, without a search.
    again = cls(**{name: value for name, value in fields.items() if value is not None})
    other = pruned_by(again, tokenizer, windows)
    for (name, a), (_, b) in zip(block_linears(model).items(), block_linears(other).items(), strict=True):
        assert torch.equal(a.weight, b.weight), name


@pytest.mark.usefixtures("small_search")
@pytest.mark.parametrize("steps", [0, 1])
def test_a_search_that_was_interrupted_goes_on_and_ends_as_one_that_was_not(
    steps, tokenizer, windows, tmp_path, monkeypatch
):
    budget = 3 * (RECOVERED_ROUND if steps else ONE_ROUND)
    fields = {
        "sparsity": 0.75,
        "allocation": "search",
        "search_budget": budget,
        "search_recovery_steps": steps,
        **QUICK,
    }
    solved = []
    original = SinkAwareWandaModifier._sweep_statistics

    def counting(self, engine, passes, targets, *rest):
        def counted(block):
            solved.extend(target.name for target in targets(block))
            return targets(block)

        original(self, engine, passes, counted, *rest)

    monkeypatch.setattr(SinkAwareWandaModifier, "_sweep_statistics", counting)
    whole = SinkAwareWandaModifier(search_directory=str(tmp_path / "whole"), **fields)
    pruned_by(whole, tokenizer, windows)
    assert len(solved) == 42
    assert whole.allocation_note.startswith(f"search: {budget} forward tokens in 3 rounds")

    # First while the levels are solved, then in the second round.
    write, write_state = LevelDatabase.write, LevelDatabase.write_state

    def interrupted_write(self, name, *rest):
        if ".blocks.3." in name:
            raise KeyboardInterrupt
        write(self, name, *rest)

    def interrupted_state(self, state):
        write_state(self, state)
        if state["rounds"] == 2:
            raise KeyboardInterrupt

    solved.clear()
    halves = tmp_path / "halves"
    for name, stop, expected in (("write", interrupted_write, 28), ("write_state", interrupted_state, 21)):
        with monkeypatch.context() as patch:
            patch.setattr(LevelDatabase, name, stop)
            with pytest.raises(KeyboardInterrupt):
                pruned_by(SinkAwareWandaModifier(search_directory=str(halves), **fields), tokenizer, windows)
        assert len(solved) == expected
        solved.clear()
    resumed = SinkAwareWandaModifier(search_directory=str(halves), **fields)
    pruned_by(resumed, tokenizer, windows)
    assert solved == []
    assert (resumed.allocation, resumed.allocation_note) == (whole.allocation, whole.allocation_note)

    # The directory belongs to this search, and says so before the first pass.
    other = SinkAwareWandaModifier(search_directory=str(halves), **{**fields, "sparsity": 0.7})
    with pytest.raises(UsageError, match="halves belongs to another search"):
        pruned_by(other, tokenizer, windows)


@pytest.mark.usefixtures("small_search")
def test_the_seed_decides(tokenizer, windows):
    notes = []
    for seed in (1, 2):
        fields = {"sparsity": 0.75, "allocation": "search", "search_budget": ONE_ROUND, **QUICK}
        modifier = SinkAwareWandaModifier(seed=seed, **fields)
        pruned_by(modifier, tokenizer, windows)
        notes.append(modifier.allocation_note.replace(f"seed {seed}", ""))
    assert notes[0] != notes[1]


@pytest.mark.usefixtures("small_search")
def test_a_disk_without_room_for_the_database_is_refused(model, tokenizer, windows, monkeypatch):
    asked = []

    def full(path, *, overwrite, needed_bytes):
        asked.append(needed_bytes)
        raise UsageError(f"output {path} needs about 9 GB and the disk has 1 GB free")

    monkeypatch.setattr(allocating_base, "check_output", full)
    modifier = SinkAwareADMMModifier(sparsity=0.75, allocation="search", search_budget=ONE_ROUND, **QUICK)
    with pytest.raises(UsageError, match="needs about 9 GB"):
        run_oneshot(model, tokenizer, modifier, windows)
    # Five levels around 75 % in float32: a quarter of the values, a bit for each weight, an offset for each row.
    weights = [module.weight for module in block_linears(model).values()]
    assert asked[0] == pytest.approx(sum(5 * (W.numel() * (0.25 * 4 + 0.125) + 8 * len(W)) for W in weights), rel=1e-3)


def test_the_estimate_of_an_8b_model():
    """The numbers in docs/allocation.md, on a network without memory."""
    config = LLaDAConfig(
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=32,
        mlp_hidden_size=12288,
        vocab_size=126464,
        embedding_size=126464,
        max_sequence_length=4096,
    )
    with torch.device("meta"):
        model = LLaDAModelLM(config).to(torch.bfloat16)
    estimate = SinkAwareADMMModifier(sparsity=0.75, allocation="search").estimate(model, 128, 128 * 2048)
    assert estimate.sweeps[1].num_passes * estimate.sweeps[1].runs_per_block * estimate.num_blocks == 40960
    assert estimate.search.candidates == 782
    assert 3.8e6 < estimate.search.tokens <= 4_000_000
    assert round(estimate.search.database_bytes / 1e9) == 48
    assert round(estimate.search.prediction_bytes / 1e9, 1) == 0.7
    # So its weights are read anew for each candidate.
    assert estimate.search.decoded_bytes > CACHE_BYTES


@pytest.mark.usefixtures("small_search")
def test_the_searched_recipe(tokenizer, windows):
    """The recipe through oneshot(), on one round, a coarse grid and a fast solver."""
    content = yaml.safe_load((RECIPES / "sink_aware_admm_searched.yaml").read_text())
    fields = content["prune_stage"]["prune_modifiers"]["SinkAwareADMMModifier"]
    assert fields["allocation"] == "search"
    fields |= {"search_budget": ONE_ROUND, **QUICK, **FAST[SinkAwareADMMModifier]}
    model = load_model(EMBEDDED_MODEL, torch.float32)
    run_oneshot(model, tokenizer, yaml.safe_dump(content), windows)
    of_blocks, total = zeros_by_block(model)
    assert total == pytest.approx(fields["sparsity"], abs=1e-4)
    # Which list so few tokens find is chance; that the model has the one that was found isn't.
    (modifier,) = active_session().lifecycle.recipe.modifiers
    assert modifier.allocation_note.startswith("search")
    assert of_blocks == pytest.approx(modifier.allocation, abs=1e-4)
