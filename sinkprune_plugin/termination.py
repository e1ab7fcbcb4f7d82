"""Ending a process without leaving half-written directories behind.

SIGTERM (kill, a batch system's time limit) and SIGHUP (a closed terminal) end a process by default without running any
``finally``. While a directory is being written, they remove it first and then end the process as they always do.
"""

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

__all__ = ["removed_on_termination", "uninterrupted"]

_ENDING = (signal.SIGTERM, signal.SIGHUP)
# Keyed by the writing process: a forked worker that is ended must not remove what its parent still writes.
_unfinished: list[tuple[int, Path]] = []


def _end(number: int, _: FrameType | None) -> None:
    for process, directory in _unfinished:
        if process == os.getpid():
            shutil.rmtree(directory, ignore_errors=True)
    # As if there had been no handler, so that the caller sees how the process ended.
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


@contextlib.contextmanager
def removed_on_termination(directory: Path) -> Iterator[None]:
    """Have a directory removed if the process is ended by SIGTERM or SIGHUP.

    A signal that the program handles or ignores itself stays as it is. Outside of the main thread, where Python allows
    no change of handlers, nothing changes either.

    :param directory: directory that isn't complete; it need not exist
    """
    entry = os.getpid(), directory
    _unfinished.append(entry)
    changed = []
    if threading.current_thread() is threading.main_thread():
        changed = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]
        for number in changed:
            signal.signal(number, _end)
    try:
        yield
    finally:
        for number in changed:
            if signal.getsignal(number) is _end:
                signal.signal(number, signal.SIG_DFL)
        _unfinished.remove(entry)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off Ctrl-C, SIGTERM and SIGHUP until the end of the block, for renames that belong together."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *_ENDING)}
    # None: set by something other than Python, which couldn't be put back.
    handlers = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
    for number in handlers:
        signal.signal(number, lambda received, _: arrived.append(received))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for each in dict.fromkeys(arrived):
            signal.raise_signal(each)
