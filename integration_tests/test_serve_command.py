"""`sinkprune serve` up to the call of vLLM: what is refused, the arguments of vLLM, and how it is ended.

The server itself is in test_vllm_server.py. Here a package named vllm takes its place and reports how it is called.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest
import torch
from vllm_engine import clean_environment

from sinkprune_plugin import devices
from sinkprune_plugin.commands.serve import cpu_options, serve
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.loading import EMBEDDED_MODEL
from sinkprune_plugin.vllm.cpu import prepare

STAND_IN = """
import json, os, sys

def main():
    names = ("SINKPRUNE_VLLM_ON_CPU", "TRITON_INTERPRET", "VLLM_USE_V2_MODEL_RUNNER")
    environment = {name: os.environ[name] for name in names if name in os.environ}
    print(json.dumps({"argv": sys.argv, "environment": environment, "pid": os.getpid()}))
    sys.exit(7)
"""
# As on a machine with a GPU, up to the call of vLLM.
WITH_GPU = """
import torch
from sinkprune_plugin import devices
devices._accelerators = lambda: (torch.device("cuda"), 1)
"""
CLI = "from sinkprune_plugin.cli import main; main()"


def install(folder, version):
    """A distribution vllm of that version that reports how it is called."""
    package = folder / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    for directory in (package, package.parent, package.parent.parent):
        (directory / "__init__.py").touch()
    (package / "main.py").write_text(STAND_IN)
    metadata = folder / f"vllm-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


def call(*arguments, before="", folder=None):
    environment = clean_environment()
    if folder is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), environment.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-c", f"{before}\n{CLI}", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    out, err = process.communicate(timeout=120)
    return process, out, err


def copy_model(folder):
    folder.mkdir()
    for file in EMBEDDED_MODEL.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_what_cannot_be_served_is_one_line_and_vllm_is_not_asked(tmp_path):
    install(tmp_path, "0.32.0+cpu")
    process, out, err = call("serve", "no/such-directory", "--port", "8001", folder=tmp_path)
    assert process.returncode == 2
    assert err == "sinkprune: no/such-directory isn't a directory; name the directory of a checkpoint\n"
    assert out == ""


def test_damaged_checkpoints_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"has neither model\.safetensors nor"):
        serve(tmp_path, [])
    model = copy_model(tmp_path / "model")
    (model / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match="can't load the tokenizer"):
        serve(model, ["--port", "8001"])
    (model / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json isn't readable JSON"):
        serve(model, [])
    weights = (EMBEDDED_MODEL / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UsageError, match=r"model\.safetensors"):
        serve(model, [])


def test_without_vllm_the_command_that_installs_it_is_named():
    process, _, err = call("serve", EMBEDDED_MODEL, before="import sys; sys.modules['vllm'] = None")
    assert process.returncode == 2
    assert err.startswith("sinkprune: vLLM isn't installed; run ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("accelerators", "command"),
    [((None, 0), "make setup-vllm"), ((torch.device("cuda"), 1), "pip install vllm==0.32.0 && pip install --no-deps")],
    ids=["cpu", "gpu"],
)
def test_the_command_is_that_of_the_machine(accelerators, command, monkeypatch):
    monkeypatch.setattr(devices, "_accelerators", lambda: accelerators)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UsageError, match=command):
        prepare()


def test_a_gpu_build_without_a_gpu_is_refused(tmp_path, monkeypatch):
    install(tmp_path, "0.32.0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(devices, "_accelerators", lambda: (None, 0))
    with pytest.raises(UsageError, match="this vLLM is built for a GPU and none is here; run `make setup-vllm`"):
        prepare()


# Names that `sinkprune` itself has, short ones, values that look like options, an end of options.
OPTIONS = ["--help", "--debug", "-tp", "2", "--port", "-1", "--", "--version", "--dtype", "bfloat16"]


def test_on_a_cpu_vllm_gets_defaults_the_options_as_they_are_and_its_environment(tmp_path):
    install(tmp_path, "0.32.0+cpu")
    process, out, err = call("serve", EMBEDDED_MODEL, *OPTIONS, folder=tmp_path)
    assert process.returncode == 7, err
    said = json.loads(out)
    defaults = ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8"]
    assert said["argv"] == ["vllm", "serve", str(EMBEDDED_MODEL), *defaults, *OPTIONS]
    assert said["environment"] == {
        "SINKPRUNE_VLLM_ON_CPU": "1",
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
    }
    assert err.splitlines() == [
        "sinkprune: no GPU here: vLLM's kernels run in Triton's interpreter, which is slow, for trying out; the tokens "
        "are the same"
    ]


def test_on_a_gpu_it_is_plain_vllm_serve(tmp_path):
    install(tmp_path, "0.32.0")
    process, out, err = call("serve", EMBEDDED_MODEL, *OPTIONS, folder=tmp_path, before=WITH_GPU)
    assert process.returncode == 7, err
    said = json.loads(out)
    assert said == {"argv": ["vllm", "serve", str(EMBEDDED_MODEL), *OPTIONS], "environment": {}, "pid": process.pid}
    assert err == ""


def test_an_autoregressive_model_runs_without_the_interpreter(tmp_path, monkeypatch, capsys):
    install(tmp_path, "0.32.0+cpu")
    monkeypatch.syspath_prepend(tmp_path)
    called = []
    monkeypatch.setattr("sinkprune_plugin.commands.serve.run_server", lambda *arguments: called.append(arguments))
    for name in ("TRITON_INTERPRET", "VLLM_USE_V2_MODEL_RUNNER"):
        monkeypatch.delenv(name, raising=False)
    model = copy_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    serve(model, [])
    ((_, environment),) = called
    assert environment["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert "TRITON_INTERPRET" not in environment
    assert capsys.readouterr().err == ""


def test_a_configuration_file_of_vllm_wins_over_the_defaults(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("max_num_seqs: 4\ndtype: bfloat16\n")
    assert cpu_options(["--config", str(file)]) == ["--enforce-eager"]
    with pytest.raises(UsageError, match="can't be read"):
        cpu_options(["--config", str(tmp_path / "none.yaml")])


# A server with a process of its own that it leaves behind.
SERVER = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
def end(number, frame):
    if {deaf}:
        return
    sys.exit({status})
signal.signal(signal.SIGTERM, end)
print(child.pid, flush=True)
while True:
    time.sleep(600)
"""


def start(deaf=False, status=0, before=()):
    code = textwrap.dedent(SERVER).format(deaf=deaf, status=status)
    runner = (
        "import os, sys; from sinkprune_plugin.commands.server_process import run_server\n"
        "sys.exit(run_server([sys.executable, '-c', sys.argv[1]], os.environ))"
    )
    process = subprocess.Popen([*before, sys.executable, "-c", runner, code], stdout=subprocess.PIPE, text=True)
    return process, psutil.Process(int(process.stdout.readline()))


def ended(process, child):
    status = process.wait(30)
    process.stdout.close()
    _, alive = psutil.wait_procs([child], timeout=10)
    assert all(each.status() == psutil.STATUS_ZOMBIE for each in alive)
    return status


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_server_and_its_processes_and_its_status_is_passed_on(number):
    process, child = start(status=5)
    process.send_signal(number)
    assert ended(process, child) == 5


def test_under_nohup_a_closed_terminal_ends_nothing():
    process, child = start(before=["nohup"])
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert ended(process, child) == 0


def test_a_deaf_server_is_killed_after_a_few_seconds():
    process, child = start(deaf=True)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert ended(process, child) == 128 + signal.SIGINT
    assert 4 < time.monotonic() - started < 20


def test_a_second_signal_kills_at_once():
    process, child = start(deaf=True)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert ended(process, child) == 128 + signal.SIGTERM
    assert time.monotonic() - started < 4


def test_a_server_that_is_killed_by_others_says_so():
    process, child = start()
    child.parent().kill()
    assert ended(process, child) == 128 + signal.SIGKILL
