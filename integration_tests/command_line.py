"""`sinkprune` as a separate process, or in this one, which saves the seconds that importing everything takes."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from unittest import mock

from sinkprune_plugin import cli

__all__ = ["SINKPRUNE", "run_here", "run_process"]

SINKPRUNE = Path(sys.executable).with_name("sinkprune")


def run_process(*arguments, cwd=None, timeout=300):
    """Run the installed command.

    :return: ``subprocess.CompletedProcess`` with text
    """
    command = [str(SINKPRUNE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=cwd)


def run_here(*arguments):
    """Run the function of the installed command in this process and capture its exit status, stdout and stderr.

    :return: the same as :func:`run_process`
    """
    words = ["sinkprune", *map(str, arguments)]
    status, out, err = 0, io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", words), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as ended:
            status = ended.code or 0
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())
