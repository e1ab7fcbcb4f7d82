"""BlockwiseRecoveryModifier under torchrun: two processes give the result of one."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from vllm_engine import clean_environment

from sinkprune_plugin.loading import EMBEDDED_MODEL

SCRIPT = """
import json, sys
import torch, torch.distributed as dist
from datasets import Dataset
from llmcompressor import oneshot
from safetensors.torch import load_file, save_file
from sinkprune_plugin.loading import load_model, load_tokenizer
from sinkprune_plugin.modifiers.blockwise_recovery import BlockwiseRecoveryModifier
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier
from sinkprune_plugin.modifiers import blockwise_recovery, dense_weights

if len(sys.argv) > 2:
    dist.init_process_group("gloo")
rank = dist.get_rank() if dist.is_initialized() else 0
rows = {rows}
data = Dataset.from_dict({{"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}})
written, kept_steps = [], []
fit_blocks = blockwise_recovery.fit_blocks


def fit(*args, **options):
    results = fit_blocks(*args, **options)
    kept_steps.extend(result.kept_step for result in results)
    return results


blockwise_recovery.fit_blocks = fit
save = dense_weights.save_file
dense_weights.save_file = lambda *args: (written.append(1), save(*args))[1]
grid = {{"diffusion_steps": 4, "sample_interval": 2}}
model = load_model(r"{model}", torch.float32)
modifiers = [
    SinkAwareWandaModifier(mask_structure="2:4", **grid),
    BlockwiseRecoveryModifier(epochs=4, learning_rate=1e-3, step_windows=3, held_out=0.2, **grid),
]
oneshot(model=model, tokenizer=load_tokenizer(r"{model}"), dataset=data, recipe=modifiers,
        num_calibration_samples=5, max_seq_length=48, shuffle_calibration_samples=False)
save_file({{k: v.contiguous() for k, v in model.state_dict().items()}}, sys.argv[1] + f"/{{rank}}.safetensors")
json.dump([len(written), kept_steps], open(sys.argv[1] + f"/{{rank}}.json", "w"))
"""


def test_two_processes_equal_one(tmp_path, golden_windows, request):
    """Five samples: three and two of them, one of which is held out."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(model=EMBEDDED_MODEL, rows=golden_windows[:5, :48].tolist()))
    launch = {
        "one": [sys.executable, str(script), str(tmp_path / "one")],
        "two": [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(script), str(tmp_path / "two"), "distributed"),
        ],
    }
    # Not in tmp_path: torch shares memory through a socket in TMPDIR, and a socket's path has at most 107 characters.
    scratch = Path(tempfile.mkdtemp())
    request.addfinalizer(lambda: shutil.rmtree(scratch))
    environment = {**clean_environment(), "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch)}
    for name, command in launch.items():
        (tmp_path / name).mkdir()
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert not [each for each in scratch.iterdir() if "dense-weights" in each.name]
    one = load_file(tmp_path / "one" / "0.safetensors")
    first, second = (load_file(tmp_path / "two" / f"{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first), "the ranks disagree"
    for key, weight in one.items():
        assert torch.equal(weight == 0, first[key] == 0), key
        # Gradients are summed in another order, and a step of Adam, at most 1e-3, divides by their size: where one is
        # nearly nothing its sign may differ. Seen were differences up to 1.5e-8.
        assert float((first[key] - weight).abs().mean()) < 1e-6, key
    alone, *both = (json.loads((tmp_path / path).read_text()) for path in ("one/0.json", "two/0.json", "two/1.json"))
    # Processes of one machine share the files.
    assert [alone[0], both[0][0], both[1][0]] == [6, 6, 0]
    assert alone[1] == both[0][1] == both[1][1]
    # Most blocks were trained.
    assert sum(step > 0 for step in alone[1]) >= 3
