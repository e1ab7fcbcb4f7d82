"""A server and its processes, which end when this process is told to end."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import FrameType

__all__ = ["run_server"]

# Seconds until a server that was told to end is killed. vLLM takes about one, or never ends while a client is
# connected.
PATIENCE = 5


def run_server(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command until it ends, and end it on Ctrl-C, SIGTERM and SIGHUP.

    The first signal tells the server to end, a second one or :data:`PATIENCE` seconds kill it. None of its processes is
    left behind. To be called in the main thread.

    :param command: program and arguments
    :param environment: the program's environment
    :return: its exit status, or 128 + the signal that ended it, as in shells: the one that this process received
    """
    process: subprocess.Popen[bytes] | None = None
    received: list[int] = []

    def end(number: int, _: FrameType | None) -> None:
        received.append(number)
        if process is not None:
            end_server(process)

    def end_server(server: "subprocess.Popen[bytes]") -> None:
        if len(received) > 1:
            _kill(server.pid)
        elif server.poll() is None:
            # Not SIGINT: vLLM's processes answer that with tracebacks while they start.
            server.terminate()
            signal.alarm(PATIENCE)

    # A signal that is ignored from the start stays so, as with nohup.
    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handled = [number for number in ending if signal.getsignal(number) is not signal.SIG_IGN]
    handlers = {number: signal.signal(number, end) for number in (*handled, signal.SIGALRM)}
    try:
        # A session of its own: a terminal's Ctrl-C goes to this process alone, which passes it on.
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        if received:
            # It came before the server was known to the handler.
            end_server(process)
        status = process.wait()
    finally:
        signal.alarm(0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if process is not None:
            _end_group(process.pid)
    return status if status >= 0 else 128 + (received[0] if received else -status)


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _end_group(group: int) -> None:
    """Give the server's other processes a moment to clean up, then kill them."""
    deadline = time.monotonic() + 2
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)
