"""Directories of results in processes of their own: on small disks, and ended halfway."""

import os
import signal
import subprocess
import sys
import time

import pytest
from result_directories import content, write

from sinkprune_plugin.outputs import new_directory


def run_mounted(options, place, script):
    """Run a script on a separate small disk, mounted for that process alone."""
    if subprocess.run(["unshare", "--mount", "--map-root-user", "true"], capture_output=True).returncode != 0:
        pytest.skip("no permission to mount here")
    mounted = f'mount -t tmpfs {options} none "{place}" && exec "{sys.executable}" -c "$1" "{place}"'
    head = "import sys; from pathlib import Path; from sinkprune_plugin.outputs import *\nplace = Path(sys.argv[1])\n"
    return subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", mounted, "sh", head + script],
        capture_output=True,
        text=True,
    )


def test_a_mount_point_is_filled(tmp_path):
    script = (
        "for name in ('a', 'b'):\n"
        "    with new_directory(place, overwrite=True) as directory:\n"
        "        (directory / name).write_text(name)\n"
        "print(*(file.name for file in place.iterdir()))"
    )
    done = run_mounted("", tmp_path, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["b"]


def test_weights_that_fill_the_disk_are_one_line(tmp_path):
    """safetensors reports it with an error of its own."""
    script = (
        "import torch; from safetensors.torch import save_file; from sinkprune_plugin.errors import UsageError\n"
        "try:\n"
        "    with new_directory(place / 'out', overwrite=True) as directory:\n"
        "        save_file({'x': torch.zeros(200_000)}, directory / 'x.safetensors')\n"
        "except UsageError as error:\n"
        "    print(error, list(place.iterdir()))"
    )
    done = run_mounted("-o size=100k", tmp_path, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("No space left on device; free some space []")


# The signals as a shell sets them for a command in the foreground: nohup, and a script's `&`, ignore some of them.
WRITER = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from sinkprune_plugin.outputs import new_directory
with new_directory(Path(sys.argv[1]), overwrite=True) as outer:
    with new_directory(outer / "inner", overwrite=False) as directory:
        (directory / "a").write_text("half")
        print("writing", flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("exists", [False, True])
def test_a_process_that_is_ended_leaves_nothing_half_written(number, exists, tmp_path):
    target = tmp_path / "out"
    if exists:
        write(target, old="precious")
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    # As without a handler: the shell and a batch system see which signal it was.
    assert process.wait(20) == -number
    assert content(tmp_path) == ({"out/old": "precious"} if exists else {})
    assert len(list(tmp_path.rglob("*"))) == (2 if exists else 0)


def test_a_forked_worker_that_is_ended_leaves_its_parents_directory_alone(tmp_path):
    with new_directory(tmp_path / "out", overwrite=False) as directory:
        (directory / "a").write_text("1")
        ready, say_ready = os.pipe()
        child = os.fork()
        if child == 0:
            # Python drops a signal that arrives before the fork is complete.
            os.write(say_ready, b"1")
            time.sleep(20)
            os._exit(0)
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert content(tmp_path) == {"out/a": "1"}
