"""The command line as a user runs it: exit codes, one-line errors, nothing written on failure."""

import json

import pytest
import torch
from command_line import run_here, run_process
from golden_data import RECIPES
from safetensors.torch import load_file, save_file

from sinkprune_plugin import __version__
from sinkprune_plugin.formats import load_sparse_checkpoint
from sinkprune_plugin.loading import EMBEDDED_MODEL

QUICK_RECIPE = """
prune_stage:
  prune_modifiers:
    SinkAwareWandaModifier:
      sparsity: 0.5
      mask_structure: "2:4"
      diffusion_steps: 4
      sample_interval: 2
"""


def fails(message, *arguments, output=None, run=run_here):
    done = run(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("sinkprune: ")
    assert message in last
    assert "Traceback" not in done.stderr
    if output is not None:
        assert not output.exists()
        assert not list(output.parent.glob(f".{output.name}*"))


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(QUICK_RECIPE)
    return path


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    recipe = folder / "recipe.yaml"
    recipe.write_text(QUICK_RECIPE)
    output = folder / "pruned"
    done = run_process(
        "prune", EMBEDDED_MODEL, "--recipe", recipe, "--num-samples", 2, "--seq-len", 64, "--output", output, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    assert "sinks per timestep" in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["pruned", "recipe.yaml"]
    return output


def test_prune_writes_a_whole_checkpoint_with_its_provenance(pruned):
    names = {path.name for path in pruned.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.yaml", "generation_config.json"} <= names
    weight = load_sparse_checkpoint(pruned)["model.transformer.blocks.3.up_proj.weight"]
    assert ((weight.reshape(-1, 4) == 0).sum(-1) == 2).all()
    record = json.loads((pruned / "sinkprune_provenance.json").read_text())
    assert record["versions"]["sinkprune-plugin"] == __version__
    assert record["settings"]["num_samples"] == 2
    assert "SinkAwareWandaModifier" in record["settings"]["recipe"]


def test_info_prints_a_table_or_json(pruned):
    table = run_here("info", pruned)
    assert table.returncode == 0, table.stderr
    assert "up_proj" in table.stdout
    found = json.loads(run_here("info", pruned, "--json").stdout)
    assert found["family"] == "llada"
    assert found["by_type"]["up_proj"]["sparsity"] == 0.5
    # The head's name ends like a block's Linear, so it counts with those; by layer it stands apart.
    assert found["by_layer"]["model.transformer.ff_out"]["zeros"] == 0
    assert found["file_bytes"] > 0


def test_sinks_writes_numbers_and_a_plot(tmp_path):
    done = run_process("sinks", EMBEDDED_MODEL, "--num-samples", 2, "--seq-len", 64, "--output", tmp_path / "sinks")
    assert done.returncode == 0, done.stderr
    assert "sinks" in done.stdout
    report = json.loads((tmp_path / "sinks" / "sinks.json").read_text())
    assert len(report["steps"]) == 10
    assert (tmp_path / "sinks" / "sinks.png").stat().st_size > 10_000


def test_prune_refuses_bad_input_before_it_writes(tmp_path, recipe, pruned):
    out = tmp_path / "out"
    quick = ("--num-samples", 2, "--seq-len", 64, "--output", out)
    fails("recipe no-such.yaml doesn't exist", "prune", EMBEDDED_MODEL, "--recipe", "no-such.yaml", *quick, output=out)
    fails("nothing doesn't exist", "prune", tmp_path / "nothing", "--recipe", recipe, *quick, output=out)
    fails("entries; choose another directory or pass --overwrite", "prune", EMBEDDED_MODEL, "--recipe", recipe,
          "--output", pruned)  # fmt: skip
    fails("at least 8", "prune", EMBEDDED_MODEL, "--recipe", recipe, "--seq-len", 4, "--output", out, output=out)
    bad = tmp_path / "bad.yaml"
    for old, new, message in [
        ("sparsity: 0.5", "sparsity: 1.7", "sparsity 1.7 is outside (0, 1)"),
        ('"2:4"', '"4:2"', 'mask_structure "4:2"'),
        ("sample_interval: 2", "sample_interval: 9", "sample_interval"),
        ("sparsity: 0.5", "sink_std: -1", "sink_std: Input should be greater than or equal to 0, not -1"),
        ("sparsity: 0.5", "sink_alpha: .inf", "sink_alpha: Input should be a finite number, not inf"),
    ]:
        bad.write_text(QUICK_RECIPE.replace(old, new))
        fails(message, "prune", EMBEDDED_MODEL, "--recipe", bad, *quick, output=out)


def test_a_model_with_nan_is_refused_and_nothing_is_written(tmp_path, recipe):
    model = tmp_path / "model"
    model.mkdir()
    for file in EMBEDDED_MODEL.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model / "model.safetensors")
    tensors["model.transformer.blocks.1.ff_norm.weight"][0] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    quick = ("--num-samples", 2, "--seq-len", 64, "--output", out)
    fails("calibration batch 0", "prune", model, "--recipe", recipe, *quick, output=out)


def test_info_refuses_what_is_no_checkpoint(tmp_path):
    fails("has no config.json", "info", tmp_path)
    (tmp_path / "config.json").write_text("{")
    fails("isn't readable JSON", "info", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    fails("no *.safetensors", "info", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    fails("can't be read", "info", tmp_path)


@pytest.mark.parametrize(
    "command",
    [
        ("sinks", "no-such-model"),
        ("verify", "no-such-model", "no-such-model"),
        ("prune", "no-such-model", "--recipe", RECIPES / "wanda_as_published.yaml"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_any_work(command, tmp_path):
    out = tmp_path / "out"
    fails("device 'abacus' is unknown; use auto, cpu,", *command, "--device", "abacus", "--output", out, output=out)


def test_wrong_options_are_one_line(tmp_path):
    fails("No such command", "prnue", run=run_process)
    fails("recipe", "prune", EMBEDDED_MODEL, "--output", tmp_path / "out", output=tmp_path / "out")
    fails("batch-size", "sinks", EMBEDDED_MODEL, "--batch-size", 0, "--output", tmp_path / "out")
    assert run_here("--version").stdout.strip() == __version__


def test_debug_shows_the_traceback(tmp_path):
    done = run_process("--debug", "info", tmp_path)
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_the_named_recipes_exist():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {
        "sink_aware_wanda",
        "sink_aware_wanda_2of4",
        "sink_aware_sparsegpt",
        "sink_aware_sparsegpt_2of4",
        "sink_aware_sparsegpt_fp8",
        "sink_aware_admm",
        "sink_aware_admm_2of4",
        "sink_aware_admm_fp8",
        "sink_aware_structured",
        "sink_aware_structured_then_2of4",
        "sink_aware_admm_searched",
        "sink_aware_admm_recovered",
        "wanda_as_published",
        "sparsegpt_as_published",
        "aimer",
        "reap_trajectory",
    }
