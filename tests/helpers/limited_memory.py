"""A bound on the memory of this process, so that a file of some bytes that asks for gigabytes fails at once."""

import contextlib
import resource
from pathlib import Path


@contextlib.contextmanager
def limited_memory(more=400_000_000):
    """Make allocations fail that would grow the address space by more than some bytes. Linux only.

    :param more: how many; torch's buffers and Python's own growth included
    """
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
