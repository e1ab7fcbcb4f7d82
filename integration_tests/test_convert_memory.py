"""The memory that converting a checkpoint takes, measured in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_maker import two_of_four
from safetensors.torch import save_file


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' count of resident memory")
def test_memory_of_converting(tmp_path):
    """At most a few times the largest tensor, whatever the size of a shard or the model."""
    torch.manual_seed(0)
    weight = two_of_four(1024, 1024)
    tensors = {f"layers.{number}.weight": weight.clone() for number in range(64)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    code = f"""
import torch
from pathlib import Path
from sinkprune_plugin.formats import convert_checkpoint, load_sparse_checkpoint
torch.set_num_threads(1)
def peak():
    # getrusage would do, but on Linux its peak starts with that of the process which started this one.
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
load_sparse_checkpoint({str(tmp_path)!r})["layers.0.weight"]
before = peak()
convert_checkpoint({str(tmp_path)!r}, {str(tmp_path / "sparse")!r}, "sparse-24-bitmask", progress=False)
convert_checkpoint({str(tmp_path / "sparse")!r}, {str(tmp_path / "dense")!r}, "dense", progress=False)
print(peak() - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # The file has 128 MiB, a tensor 2. 24 MiB leave room for both forms of a tensor, the positions of a piece and the
    # allocator's slack, and are far below the shard.
    grown = int(result.stdout) * 1024
    assert grown < 24 << 20, f"{grown / 2**20:.1f} MiB"
    assert (tmp_path / "dense" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
