"""What the commands print: a line for each step and the result, unless the rest is asked for."""

import subprocess
import sys

import pytest
from command_line import run_here, run_process
from golden_data import RECIPES
from llmcompressor.logger import configure_logger
from loguru import logger
from tiny_moe import write_tiny_moe

from sinkprune_plugin.loading import EMBEDDED_MODEL
from sinkprune_plugin.modifiers.oneshot_flow import log_to
from sinkprune_plugin.steps import quiet_steps

RECIPE = """
prune_stage:
  prune_modifiers:
    SinkAwareWandaModifier: {sparsity: 0.5, mask_structure: "2:4", diffusion_steps: 4, sample_interval: 2}
"""
# The demo on less data, as everything it prints depends on its methods alone.
SMALL_DEMO = """
import sys
from pathlib import Path
from sinkprune_plugin.commands import demo
from sinkprune_plugin.verification import verify
demo.CALIBRATION_WINDOWS, demo.TEST_WINDOWS, demo.SEQ_LEN, demo.CORRUPTIONS = 2, 4, 64, 2
verify.LONGEST_WINDOW = 64
demo.run_demo(Path(sys.argv[1]))
"""


def lines_of(done):
    """Lines on stdout and on stderr, where a bar redraws its line with carriage returns and each drawing counts."""
    assert done.returncode == 0, done.stderr
    return [text.replace("\r", "\n").splitlines() for text in (done.stdout, done.stderr)]


STRUCTURED = """
prune_stage:
  prune_modifiers:
    SinkAwareStructuredModifier: {mlp_channels: 0.5, allocation: error, diffusion_steps: 4, sample_interval: 2}
"""


def prune(run, folder, *more, recipe=RECIPE):
    (folder / "recipe.yaml").write_text(recipe)
    options = ("--recipe", folder / "recipe.yaml", "--num-samples", 2, "--seq-len", 64, "--output", folder / "out")
    return lines_of(run("prune", EMBEDDED_MODEL, *options, *more))


def test_prune_says_one_line_for_each_stage(tmp_path):
    stdout, stderr = prune(run_process, tmp_path)
    assert stdout == [f"pruned model written to {tmp_path / 'out'}"]
    beginnings = [
        "loading ",
        "pruning with recipe.yaml (2 × 64 tokens, ",
        "SinkAwareWandaModifier: 4 passes",
        "SinkAwareWandaModifier: 42 modules",
        f"writing {tmp_path}",
    ]
    assert len(stderr) == len(beginnings), stderr
    assert all(map(str.startswith, stderr, beginnings)), stderr
    stdout, verbose = prune(run_here, tmp_path, "--overwrite", "--verbose")
    assert stdout == [f"pruned model written to {tmp_path / 'out'}"]
    assert len(verbose) > 12
    for shown in ("Loading weights", "Compression lifecycle", "Writing model shards"):
        assert any(shown in line for line in verbose), shown
        assert not any(shown in line for line in stderr), shown


def test_structured_pruning_says_what_it_chose_and_what_is_left(tmp_path):
    _, stderr = prune(run_process, tmp_path, recipe=STRUCTURED)
    name = "SinkAwareStructuredModifier"
    beginnings = [
        "loading ",
        "pruning with recipe.yaml (2 × 64 tokens, ",
        f"{name}: 4 passes + 4 passes + 4 passes through 6 blocks",
        f"{name}: widths chosen by error, 1.3",
        f"{name}: 6 blocks of 512 channels and 6 heads, 3.4 M parameters → 6 blocks of ",
        f"writing {tmp_path}",
    ]
    assert len(stderr) == len(beginnings), stderr
    assert all(map(str.startswith, stderr, beginnings)), stderr


@pytest.mark.parametrize(
    ("name", "middle"),
    [
        (
            "aimer",
            [
                "scoring experts with aimer.yaml (no data, weights read from the files)",
                "writing {output}",
                "ExpertPruningModifier: 6 of 8 experts stay in each of 6 blocks (aimer)",
            ],
        ),
        (
            "reap_trajectory",
            [
                "pruning with reap_trajectory.yaml (2 × 64 tokens, ",
                "ExpertPruningModifier: 20 passes + 20 passes through 6 blocks",
                "ExpertPruningModifier: 6 of 8 experts stay in each of 6 blocks (reap)",
                "writing {output}",
            ],
        ),
    ],
)
def test_the_recipes_for_experts_say_which_stay(name, middle, tmp_path):
    write_tiny_moe(tmp_path / "model")
    recipe = (RECIPES / f"{name}.yaml", "--num-samples", 2, "--seq-len", 64)
    done = run_process("prune", tmp_path / "model", "--recipe", *recipe, "--output", tmp_path / "out")
    stdout, stderr = lines_of(done)
    assert stdout == [f"pruned model written to {tmp_path / 'out'}"]
    # A bar of an instant may be drawn.
    stderr = [line for line in stderr if line and not line.startswith("scoring experts:")]
    beginnings = [("reading " if name == "aimer" else "loading "), *(each.format(output=tmp_path) for each in middle)]
    assert len(stderr) == len(beginnings), stderr
    assert all(map(str.startswith, stderr, beginnings)), stderr


def test_the_demo_says_one_line_for_each_method(tmp_path):
    command = [sys.executable, "-c", SMALL_DEMO, "out"]
    stdout, stderr = lines_of(subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path))
    methods = ["dense", "wanda", "sparsegpt", "sink-aware-sparsegpt", "sink-aware-admm", "structured"]
    assert [line.split(":")[0] for line in stderr] == [*methods, "structured", "sink-aware-admm"]
    assert [line.split()[0].rstrip(",") for line in stdout[3:9]] == methods
    assert stdout[9].startswith("speed of structured: ")
    assert len(stdout) < 32, stdout
    assert (tmp_path / "out" / "verify" / "report.html").is_file()


@pytest.fixture
def _logging_restored():
    """After pytest's own stdout, to which llm-compressor would log otherwise, has gone."""
    yield
    configure_logger()


@pytest.fixture
def logged(_logging_restored, capfd):
    """Function that logs as llm-compressor and a modifier do, and gives back what the console got."""

    def log(**options):
        with quiet_steps() as steps, log_to(steps, **options):
            messages = [
                ("sinkprune_plugin.modifiers.base", "INFO", "42 modules {pruned}"),
                ("llmcompressor.core", "INFO", "lifecycle"),
                ("llmcompressor.core", "WARNING", "few samples"),
                ("llmcompressor.core", "WARNING", "No accelerator available! Compressing model on CPU instead"),
                ("llmcompressor.core", "METRIC", "time 0.1s"),
                ("compressed_tensors.offload", "ERROR", "no <memory> left"),
            ]
            for name, level, message in messages:
                logger.patch(lambda record, name=name: record.update(name=name)).log(level, "{}", message)
        return capfd.readouterr().err.splitlines()

    return log


def test_of_the_log_only_what_matters_is_shown(logged):
    both = ["warning: few samples", "error: no <memory> left"]
    assert logged() == ["42 modules {pruned}", *both]
    assert logged(summaries=False) == both


def test_llm_compressor_logs_as_before_afterwards(logged, capfd):
    logged()
    logger.info("as before")
    captured = capfd.readouterr()
    assert "INFO - as before" in captured.out
    assert captured.err == ""
