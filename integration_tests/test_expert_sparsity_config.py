"""What is noted of removed experts is what compressed-tensors 0.20 reads; later releases are made for it."""

import json
import os
import subprocess
import sys

import pytest
from command_line import run_here
from golden_data import RECIPES
from official_checkpoints import write_llada2
from sparse_models import prune_2_of_4

from sinkprune_plugin.loading import load_model

pytestmark = [pytest.mark.slow]

READ = """
import json, sys
import compressed_tensors
from compressed_tensors.config import ExpertSparsityConfig

assert compressed_tensors.__version__ == "0.20.0", compressed_tensors.__file__
block = json.loads(open(sys.argv[1]).read())["quantization_config"]
print(json.dumps(ExpertSparsityConfig.model_validate(block["moe_sparsity_config"]).model_dump(mode="json")))
"""


def test_it_is_read_by_the_release_that_has_it(tmp_path):
    target = tmp_path / "compressed-tensors"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
    subprocess.run([*install, "compressed-tensors==0.20.0"], check=True)
    write_llada2(tmp_path / "random", num_hidden_layers=3)
    prune_2_of_4(load_model(tmp_path / "random")).save_pretrained(tmp_path / "dense")
    done = run_here("prune", tmp_path / "dense", "--recipe", RECIPES / "aimer.yaml", "--output", tmp_path / "fewer")
    assert done.returncode == 0, done.stderr
    done = run_here("convert", tmp_path / "fewer", "--to", "sparse-bitmask", "--output", tmp_path / "sparse")
    assert done.returncode == 0, done.stderr
    config = tmp_path / "sparse" / "config.json"
    environment = os.environ | {"PYTHONPATH": str(target), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    result = subprocess.run(
        [sys.executable, "-c", READ, str(config)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    counts = [len(numbers) or None for numbers in json.loads(config.read_text())["sinkprune_kept_experts"]]
    assert counts == [None, 8, 8]
    assert json.loads(result.stdout) == {"method": "prune", "num_experts": counts}
