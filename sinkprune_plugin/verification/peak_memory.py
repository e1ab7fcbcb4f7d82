"""The most memory that a model takes while it is loaded and generates, each in a process of its own.

Weights alone don't tell it: reading the files, activations and caches count as well. Two models in one process would
count each other's, and memory that the first one freed.
"""

import json
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.verification.speed import Workload

__all__ = ["PeakMemory", "peak_memory"]


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of one process.

    :param start_bytes: most that were resident before the checkpoint was opened: Python and its libraries
    :param peak_bytes: most that were resident in all, pages of the weight files that were read included
    :param device_bytes: most that tensors took on the accelerator; None without one
    """

    start_bytes: int
    peak_bytes: int
    device_bytes: int | None


def peak_memory(directory: Path, workload: Workload, dtype: str | None, device: torch.device) -> PeakMemory:
    """Load a checkpoint in a new process, generate once for the largest batch, and see what that took.

    :param directory: the checkpoint
    :param workload: what is generated; with the first of its cache modes
    :param dtype: name of the precision; None takes the checkpoint's own
    :param device: where the model runs
    :return: the process's peaks
    :raises UsageError: if the process fails, for instance as there isn't enough memory
    """
    request = {
        "directory": str(directory),
        "prompts": workload.prompts[: max(workload.batch_sizes)].tolist(),
        "gen_length": workload.gen_length,
        "block_length": workload.block_length,
        "steps": workload.steps,
        "cache": workload.caches[0],
        "dtype": dtype,
        "device": str(device),
    }
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise UsageError(f"the process that measures the peak memory of {directory} failed: {last[0]}")
    return PeakMemory(**json.loads(done.stdout.splitlines()[-1]))


def _resident() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        # Linux: getrusage() would begin with what was resident in the process that started this one.
        return 1024 * int(status.read_text(encoding="ascii").split("VmHWM:")[1].split()[0])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _main() -> None:
    from sinkprune_plugin.loading import load_config, load_model
    from sinkprune_plugin.models.catalogue import native_model
    from sinkprune_plugin.sampling import denoise

    request = json.load(sys.stdin)
    # The family's classes are imported when they are asked for.
    native = native_model(load_config(request["directory"]))
    if native is not None:
        native.model_class()
    start = _resident()
    dtype = "auto" if request["dtype"] is None else getattr(torch, request["dtype"])
    device = torch.device(request["device"])
    denoise(
        load_model(request["directory"], dtype, device),
        torch.tensor(request["prompts"]),
        gen_length=request["gen_length"],
        block_length=request["block_length"],
        steps=request["steps"],
        cache=request["cache"],
    )
    on_device = None if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)
    sys.stdout.write(json.dumps(asdict(PeakMemory(start, _resident(), on_device))) + "\n")


if __name__ == "__main__":
    _main()
