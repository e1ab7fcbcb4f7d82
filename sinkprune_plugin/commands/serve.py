"""`sinkprune serve`: vLLM's own server on a checkpoint, on a GPU or, slowly, on a CPU."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from sinkprune_plugin.commands.server_process import run_server
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import load_sparse_checkpoint
from sinkprune_plugin.formats.files.shard_reader import CONFIG_NAME, read_json
from sinkprune_plugin.loading import load_tokenizer
from sinkprune_plugin.models.catalogue import ARCHITECTURES
from sinkprune_plugin.vllm.cpu import SLOW, is_cpu_build, require_vllm, server_environment

__all__ = ["cpu_options", "serve"]

# float32 runs on every CPU; compiling takes longer than it saves; a step takes as long as all of its requests together.
_ON_CPU = {"dtype": "float32", "enforce-eager": None, "max-num-seqs": "8"}
# Triton's bindings list in sixty lines what they leak when the process ends, after all of vLLM's output.
_QUIET_END = "import atexit, os; atexit.register(os.dup2, os.open(os.devnull, os.O_WRONLY), 2); "
# The command `vllm`, wherever its script may be.
_VLLM = "import sys; sys.argv[0] = 'vllm'; from vllm.entrypoints.cli.main import main; main()"


def serve(checkpoint: Path, options: Sequence[str]) -> int:
    """Serve a checkpoint until the server ends or is told to end.

    With a GPU build of vLLM this process becomes `vllm serve`. With a CPU build the server runs next to it, prepared
    for a CPU, and is ended within seconds of Ctrl-C, SIGTERM or SIGHUP, requests or not.

    :param checkpoint: checkpoint directory
    :param options: further options of `vllm serve`, passed on as they are
    :return: exit status of the server
    :raises UsageError: if the directory can't be served or there is no vLLM for this machine
    """
    diffusion = _check(checkpoint, options)
    require_vllm()
    # -P: a folder called vllm in the current directory must not be imported.
    python = [sys.executable, "-P", "-c"]
    if not is_cpu_build():
        os.execv(sys.executable, [*python, _VLLM, "serve", str(checkpoint), *options])
    if diffusion:
        sys.stderr.write(f"sinkprune: {SLOW}\n")
    environment = os.environ | server_environment(diffusion=diffusion)
    command = [*python, _QUIET_END + _VLLM, "serve", str(checkpoint), *cpu_options(options), *options]
    return run_server(command, environment)


def cpu_options(given: Sequence[str]) -> list[str]:
    """Defaults for a CPU, to be put before the options given: vLLM takes the last of an option given twice.

    :param given: options of `vllm serve`; those in the file of a ``--config`` would come before ours, so what it names
        is left out
    """
    configured: set[str] = set()
    if "--config" in given[:-1]:
        file = given[given.index("--config") + 1]
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UsageError(f"--config {file} can't be read ({type(error).__name__})") from error
        # What isn't a mapping is refused by vLLM.
        configured = {str(name).replace("_", "-") for name in content} if isinstance(content, dict) else set()
    found = []
    for name, value in _ON_CPU.items():
        if name not in configured:
            found += [f"--{name}"] if value is None else [f"--{name}", value]
    return found


def _check(checkpoint: Path, options: Sequence[str]) -> bool:
    """Refuse what can't be served before half a minute is spent on it.

    :return: whether the model denoises
    """
    # The headers of all weight files are read.
    load_sparse_checkpoint(checkpoint)
    architectures = read_json(checkpoint / CONFIG_NAME).get("architectures")
    if not any(option.startswith(("--tokenizer", "--skip-tokenizer")) for option in options):
        load_tokenizer(checkpoint)
    return isinstance(architectures, list) and any(str(name) in ARCHITECTURES for name in architectures)
