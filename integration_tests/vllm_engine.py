"""A real vLLM engine in this process, and a real server in other processes, on a machine without a GPU as well."""

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Kept to the end of the process: an engine that is garbage-collected destroys the process's parallel state, and with it
# every other engine.
_ENGINES = []
SINKPRUNE = Path(sys.executable).with_name("sinkprune")


def skip_without_vllm():
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM isn't installed; see README, Versions", allow_module_level=True)


def prepare_vllm():
    """Prepare vLLM in this process, as `sinkprune verify` does; to be called before vLLM is imported."""
    skip_without_vllm()
    from sinkprune_plugin.vllm.cpu import prepare

    prepare()


def clean_environment():
    """This process's environment without what vLLM was prepared with: that of a user's shell."""
    ours = ("VLLM_", "SINKPRUNE_", "TRITON_INTERPRET", "TORCH_DEVICE_BACKEND_AUTOLOAD")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return environment | {"VLLM_NO_USAGE_STATS": "1"}


def make_engine(model, **options):
    """An ``LLM`` in this process.

    :param model: checkpoint directory
    :param options: arguments of ``LLM`` in place of the defaults here
    """
    prepare_vllm()
    from vllm import LLM

    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 40,
        "max_num_batched_tokens": 2048,
        "diffusion_config": {"canvas_length": 128},
        "distributed_executor_backend": "uni",
        "disable_log_stats": True,
    }
    import torch

    if not torch.cuda.is_available():
        # 16 000 tokens of cache, enough for all that the tests do at once; the default is a gigabyte per engine.
        settings |= {"num_gpu_blocks_override": 128, "block_size": 128}
    engine = LLM(model=str(model), **(settings | options))
    _ENGINES.append(engine)
    return engine


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(command, log):
    """The OpenAI-compatible server in separate processes, started as a user starts it.

    :param command: `sinkprune serve …` without a port
    :param log: file for what it prints
    :return: base address and process
    """
    skip_without_vllm()
    import httpx

    port = free_port()
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*map(str, command), "--host", "127.0.0.1", "--port", str(port)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=clean_environment(),
        )
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 300
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{address}/health", timeout=5).status_code == 200:
                        break
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
            yield address, process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
