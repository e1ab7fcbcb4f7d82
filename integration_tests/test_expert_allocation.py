"""How many experts each block loses: over the depth, by error and by search, through oneshot() and in the files."""

import re
import shutil

import pytest
import torch
import yaml
from command_line import run_here
from loguru import logger
from official_checkpoints import write_llada2, write_llada_moe

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats.checkpoint_reader import CheckpointReader
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model
from sinkprune_plugin.models.expert_lists import expert_counts, experts_of, keep_experts
from sinkprune_plugin.modifiers.expert_candidates import ExpertCandidates
from sinkprune_plugin.modifiers.experts import ExpertPruningModifier
from sinkprune_plugin.modifiers.level_database import LevelDatabase
from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot
from sinkprune_plugin.pruning import search_rounds

QUICK = {"diffusion_steps": 4, "sample_interval": 2}
EXPERTS, CHOSEN = 8, 2
# Two windows of 24 tokens at two timesteps, so four passes. A round of the small search measures 4 candidates on one of
# them, 2 on two, and 2 on all.
ONE_ROUND = (4 * 1 + 2 * 2 + 2 * 4) * 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense layer and three with experts."""
    folder = tmp_path_factory.mktemp("moe") / "model"
    sizes = {"num_hidden_layers": 4, "moe_layer_freq": [0, 1, 1, 1], "num_experts": EXPERTS}
    write_llada_moe(folder, vocab_size=2048, num_experts_per_tok=CHOSEN, torch_dtype="float32", **sizes)
    for file in EMBEDDED_MODEL.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def small_search(monkeypatch):
    for name, value in {"OFFSPRING": 4, "SECOND": 2, "LAST": 1}.items():
        monkeypatch.setattr(search_rounds, name, value)


def ids(*shape):
    return torch.randint(3, 2048, shape, generator=torch.Generator().manual_seed(0))


def prune(folder, tokenizer, modifier):
    model = load_model(folder, torch.float32)
    run_oneshot(model, tokenizer, modifier, ids(2, 24))
    return model


def again(modifier):
    """A modifier with the fields that a saved recipe has."""
    names = ("experts", "score", "allocation", "allocation_note", *QUICK)
    return ExpertPruningModifier(**{name: getattr(modifier, name) for name in names})


@pytest.mark.parametrize("family", ["llada-moe", "llada2"])
def test_a_candidate_computes_what_the_smaller_model_computes(family, tmp_path):
    if family == "llada-moe":
        write_llada_moe(tmp_path, vocab_size=2048, num_experts=8, num_experts_per_tok=2, torch_dtype="float32")
        kept = {0: [0, 3, 5], 1: list(range(8))}
    else:
        # Twelve experts in four groups, with a bias that only the choice sees, behind a dense layer.
        write_llada2(tmp_path, vocab_size=2048, num_hidden_layers=3, torch_dtype="float32")
        kept = {1: [0, 2, 3, 4, 7, 8, 9, 11], 2: list(range(12))}
    dense, smaller = load_model(tmp_path, torch.float32), load_model(tmp_path, torch.float32)
    for index, numbers in kept.items():
        keep_experts(smaller, index, numbers)
    indices = list(kept)
    candidates = ExpertCandidates(
        dense.model.layers, experts_of(dense.config), indices, lambda place, level: kept[indices[place]][level:]
    )
    tokens = ids(2, 24)
    with torch.no_grad():
        whole = dense(tokens).logits
        entered = [candidates.installed(block, (0, 0)) for block in range(len(dense.model.layers))]
        for each in entered:
            each.__enter__()
        found = dense(tokens).logits
        for each in entered:
            each.__exit__(None, None, None)
        # The same products in the same order.
        assert torch.equal(found, smaller(tokens).logits)
        assert not torch.equal(found, whole)
        assert torch.equal(dense(tokens).logits, whole)


@pytest.mark.parametrize("score", ["magnitude", "frequency"])
@pytest.mark.parametrize("allocation", ["early_sparser", "late_sparser", "error"])
def test_as_many_go_in_all_and_the_recipe_says_from_where(allocation, score, folder, tokenizer):
    fields = {"score": score, "allocation_spread": 0.25, **QUICK}
    modifier = ExpertPruningModifier(experts=0.25, allocation=allocation, **fields)
    model = prune(folder, tokenizer, modifier)
    counts = expert_counts(model.config)
    assert sum(counts.values()) == 3 * 6
    assert min(counts.values()) >= CHOSEN
    removed = [0, *(EXPERTS - count for count in counts.values())]
    if allocation != "error":
        # 2 ± 1 of 8: the spread ends at half of the share.
        assert removed == ([0, 3, 2, 1] if allocation == "early_sparser" else [0, 1, 2, 3])
    assert (modifier.experts, modifier.allocation, modifier.allocation_note) == (removed, "uniform", allocation)
    # The saved fields give the same model again.
    other = prune(folder, tokenizer, again(modifier))
    assert other.config.sinkprune_kept_experts == model.config.sinkprune_kept_experts


@pytest.mark.parametrize("allocation", ["late_sparser", "error"])
def test_the_files_and_the_loaded_model_lose_the_same_and_the_saved_recipe_says_it(
    allocation, folder, tokenizer, tmp_path
):
    recipe = tmp_path / "recipe.yaml"
    fields = f"{{experts: 0.25, score: magnitude, allocation: {allocation}}}"
    recipe.write_text(f"s_stage: {{s_modifiers: {{ExpertPruningModifier: {fields}}}}}")
    done = run_here("prune", folder, "--recipe", recipe, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    modifier = ExpertPruningModifier(experts=0.25, score="magnitude", allocation=allocation)
    loaded = prune(folder, tokenizer, modifier)
    written = CheckpointReader(tmp_path / "out").config
    assert written["sinkprune_kept_experts"] == loaded.config.sinkprune_kept_experts
    [stage] = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text()).values()
    saved = stage["s_modifiers"]["ExpertPruningModifier"]
    assert (saved["experts"], saved["allocation"]) == (modifier.experts, "uniform")
    text = ", ".join(map(str, modifier.experts))
    assert f"ExpertPruningModifier: experts removed by block {text} ({allocation})" in done.stderr.splitlines()


def test_the_command_says_from_which_blocks_experts_go(folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    fields = "experts: 0.25, score: frequency, allocation: early_sparser, diffusion_steps: 4, sample_interval: 2"
    recipe.write_text(f"s_stage: {{s_modifiers: {{ExpertPruningModifier: {{{fields}}}}}}}")
    options = ("--recipe", recipe, "--num-samples", 2, "--seq-len", 24, "--output", tmp_path / "out")
    done = run_here("prune", folder, *options)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.replace("\r", "\n").splitlines()
    name = "ExpertPruningModifier"
    beginnings = [
        "loading ",
        "pruning with recipe.yaml (2 × 24 tokens, ",
        f"{name}: 4 passes + 4 passes through 4 blocks",
        f"{name}: experts removed by block 0, ",
        f"{name}: ",
        f"writing {tmp_path}",
    ]
    assert len(lines) == len(beginnings), lines
    assert all(map(str.startswith, lines, beginnings)), lines
    assert " of 8 experts stay in each of 3 blocks (frequency)" in lines[4]


@pytest.mark.usefixtures("small_search")
@pytest.mark.parametrize("score", ["magnitude", "frequency"])
def test_a_search_keeps_the_total_and_its_result_is_in_the_fields(score, folder, tokenizer):
    lines = []
    sink = logger.add(lines.append, level="INFO", format="{message}")
    modifier = ExpertPruningModifier(
        experts=0.25, score=score, allocation="search", search_budget=3 * ONE_ROUND, **QUICK
    )
    model = prune(folder, tokenizer, modifier)
    logger.remove(sink)
    counts = expert_counts(model.config)
    assert sum(counts.values()) == 3 * 6
    assert min(counts.values()) >= CHOSEN
    assert modifier.experts == [0, *(EXPERTS - count for count in counts.values())]
    note = modifier.allocation_note
    assert note.startswith(f"search: {3 * ONE_ROUND} forward tokens in 3 rounds, seed 0, distance to the dense model's")
    best, uniform = map(float, re.search(r"predictions (\S+) nats per token \(uniform (\S+)\)", note).groups())
    assert 0 <= best <= uniform
    sweeps = "no passes" if score == "magnitude" else "4 passes + 4 passes"
    assert any(f"{sweeps} through 4 blocks" in line for line in lines)
    assert any(f"search of at most {3 * ONE_ROUND:,} forward tokens on 24 candidates" in line for line in lines)
    # The saved fields give the same model again, without a search.
    other = prune(folder, tokenizer, again(modifier))
    assert other.config.sinkprune_kept_experts == model.config.sinkprune_kept_experts
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in other.state_dict().items())


@pytest.mark.usefixtures("small_search")
def test_a_search_spares_the_layer_that_needs_its_experts(folder, tokenizer):
    """The experts of two of three layers give nothing at all, so that all that go can go there."""
    model = load_model(folder, torch.float32)
    with torch.no_grad():
        for layer in (1, 3):
            for expert in model.model.layers[layer].mlp.experts:
                expert.down_proj.weight.zero_()
    modifier = ExpertPruningModifier(
        experts=2, score="magnitude", allocation="search", search_budget=12 * ONE_ROUND, **QUICK
    )
    run_oneshot(model, tokenizer, modifier, ids(2, 24))
    assert modifier.experts[2] == 0
    assert sum(modifier.experts) == 6
    assert "distance to the dense model's predictions 0.0000" in modifier.allocation_note


@pytest.mark.usefixtures("small_search")
def test_llada2_loses_as_many_of_each_group_in_a_search(tokenizer, tmp_path):
    write_llada2(tmp_path, vocab_size=2048, num_hidden_layers=3, torch_dtype="float32")
    model = load_model(tmp_path, torch.float32)
    fields = {"experts": 4, "score": "frequency", "allocation": "search", "search_budget": 20_000}
    # Windows of whole blocks.
    run_oneshot(model, tokenizer, ExpertPruningModifier(**fields, **QUICK), ids(2, 16))
    counts = expert_counts(model.config)
    assert sum(counts.values()) == 2 * 8
    for index, numbers in enumerate(model.config.sinkprune_kept_experts):
        groups = [sum(number // 3 == group for number in numbers) for group in range(4)]
        assert len(set(groups)) == 1
        assert sum(groups) == counts.get(index, 0)


@pytest.mark.usefixtures("small_search")
def test_a_search_that_was_interrupted_goes_on_and_ends_as_one_that_was_not(folder, tokenizer, tmp_path, monkeypatch):
    fields = {"experts": 2, "score": "frequency", "allocation": "search", "search_budget": 4 * ONE_ROUND, **QUICK}
    whole = ExpertPruningModifier(**fields)
    prune(folder, tokenizer, whole)
    write_state = LevelDatabase.write_state

    def interrupted(self, state):
        write_state(self, state)
        if state["rounds"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LevelDatabase, "write_state", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune(folder, tokenizer, ExpertPruningModifier(search_directory=str(tmp_path / "half"), **fields))
    rounds = []
    monkeypatch.setattr(
        LevelDatabase, "write_state", lambda self, state: (write_state(self, state), rounds.append(state["rounds"]))
    )
    resumed = ExpertPruningModifier(search_directory=str(tmp_path / "half"), **fields)
    prune(folder, tokenizer, resumed)
    assert rounds == [3, 4]
    assert (resumed.experts, resumed.allocation_note) == (whole.experts, whole.allocation_note)
    # The directory belongs to this search.
    other = ExpertPruningModifier(search_directory=str(tmp_path / "half"), **{**fields, "experts": 3})
    with pytest.raises(UsageError, match="half belongs to another search"):
        prune(folder, tokenizer, other)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("{experts: [0, 2, 2, 2], allocation: search}", "which a list fixes"),
        ("{experts: [0, 2, 2, 2], allocation: early_sparser}", "which a list fixes"),
        ("{experts: 2, allocation: search, search_recovery_steps: 2}", "has no field `search_recovery_steps`"),
        ("{experts: 2, allocation: search, search_budget: 100}", "100 tokens isn't enough for one round"),
        ("{experts: 7, allocation: late_sparser}", "remove at most 6"),
        ("{experts: 2, allocation: best}", "allocation"),
        ("{experts: 2, allocation_spread: 1.5}", "allocation_spread"),
    ],
)
def test_fields_that_do_not_fit_are_refused_in_one_line_and_nothing_is_written(fields, message, folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"s_stage: {{s_modifiers: {{ExpertPruningModifier: {fields}}}}}")
    done = run_here("prune", folder, "--recipe", recipe, "--output", tmp_path / "out", "--seq-len", 24)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_one_layer_with_experts_has_nothing_to_search(tokenizer, tmp_path):
    write_llada_moe(tmp_path, vocab_size=2048, num_hidden_layers=2, moe_layer_freq=[0, 1], torch_dtype="float32")
    model = load_model(tmp_path, torch.float32)
    modifier = ExpertPruningModifier(experts=2, score="magnitude", allocation="search", **QUICK)
    with pytest.raises(UsageError, match="1 decoder block has experts to choose among, so there is nothing"):
        run_oneshot(model, tokenizer, modifier, ids(2, 24))


def test_a_search_without_data_is_refused(folder):
    from llmcompressor import oneshot

    model = load_model(folder, torch.float32)
    with pytest.raises(UsageError, match="needs calibration data and got none"):
        oneshot(model=model, recipe=ExpertPruningModifier(experts=2, allocation="search"))
