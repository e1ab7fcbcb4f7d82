"""A real vLLM engine in this process, and a real server beside it, on a machine without a GPU as well."""

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Kept to the end of the process: an engine that is garbage-collected takes the process's parallel state with it, and
# with that every other engine.
_ENGINES = []
HARNESS = Path(__file__).parent / "vllm_harness"


def use_harness():
    """Let vLLM run on the CPU in this process; to be called before vLLM is imported."""
    pytest.importorskip("vllm", reason="vLLM isn't installed; see README, Versions")
    import torch

    if torch.cuda.is_available():
        return
    spec = importlib.util.spec_from_file_location("vllm_harness", HARNESS / "sitecustomize.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def make_engine(model, **options):
    """An ``LLM`` in this process.

    :param model: checkpoint directory
    :param options: arguments of ``LLM`` in place of the defaults here
    """
    use_harness()
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
        # 16 000 tokens of cache, enough for all that the tests do at once; the default is a gigabyte an engine.
        settings |= {"num_gpu_blocks_override": 128, "block_size": 128}
    engine = LLM(model=str(model), **(settings | options))
    _ENGINES.append(engine)
    return engine


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(model, log, *arguments):
    """The OpenAI-compatible server in processes of its own.

    :param model: checkpoint directory
    :param log: file for what it prints
    :param arguments: further command-line arguments
    :return: base address and process
    """
    pytest.importorskip("vllm", reason="vLLM isn't installed; see README, Versions")
    import httpx
    import torch

    port = free_port()
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    if not torch.cuda.is_available():
        environment |= {"PYTHONPATH": str(HARNESS), "SINKPRUNE_VLLM_ON_CPU": "1"}
    # The command `vllm` of the CPU build looks for a distribution of another name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    command += ["--diffusion-config", '{"canvas_length": 128}', "--served-model-name", "tiny", *arguments]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        try:
            address = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 180
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
