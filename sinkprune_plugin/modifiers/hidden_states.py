"""Where the hidden states of all calibration passes are kept while the decoder blocks are run one by one.

At 8 B this is the largest piece of memory of a run after the weights: samples × timesteps × T × d. It stays in main
memory, pinned where a CUDA device reads it, or in one memory-mapped file on disk.
"""

import contextlib
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import psutil
import torch

from sinkprune_plugin.errors import UsageError

__all__ = ["HiddenStates", "Place", "check_room"]

Place = Literal["memory", "disk"]

# Share of the free main memory that hidden states may take: the rest is for weights and Hessians that come later.
MEMORY_SHARE = 0.9

# Passes share allocations of this many bytes: torch rounds pinned memory up to a power of two, so that passes of 17 MB
# would take 32 MB each.
SLAB_BYTES = 2**28

# Passes that are handed to a CUDA device before it has computed the first of them. It must never run dry, but each one
# takes memory for its input and output there.
PASSES_AHEAD = 4


def check_room(num_bytes: int, place: Place) -> None:
    """Refuse hidden states that don't fit, before the first of them is computed.

    :param num_bytes: what all passes take together
    :param place: ``memory`` or ``disk``
    :raises UsageError: if there is less room than that
    """
    if place == "disk":
        directory = Path(tempfile.gettempdir())
        free, where = shutil.disk_usage(directory).free, f"{directory} has"
        remedy = "set TMPDIR to a directory on a larger disk"
    else:
        free, where = int(MEMORY_SHARE * psutil.virtual_memory().available), "main memory has"
        remedy = "set `hidden_states: disk`"
    if num_bytes > free:
        raise UsageError(
            f"the hidden states of all calibration passes take {num_bytes / 1e9:.1f} GB and {where} {free / 1e9:.1f} "
            f"GB free; {remedy}, or calibrate on fewer samples or timesteps"
        )


class HiddenStates:
    """The input of the next decoder block, for every pass; read and written pass by pass.

    On CUDA both directions are copied on a stream of their own: the next pass's states arrive, and the previous pass's
    leave, while the present one is computed. Copies on that stream keep their order, so a pass is never read before it
    has been written.

    :param place: ``memory`` or ``disk``
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._states: list[torch.Tensor] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all states."""
        return sum(state.numel() * state.element_size() for state in self._states)

    def allocate(self, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, *, pinned: bool) -> None:
        """Make room for all passes; does nothing if exactly this room is there already.

        :param shapes: (B, T, d) of each pass
        :param dtype: the hidden states' dtype
        :param pinned: a CUDA device will read them
        :raises UsageError: if there isn't enough memory, or space on the disk
        """
        if [state.shape for state in self._states] == list(shapes) and self._states[0].dtype == dtype:
            return
        sizes = [torch.Size(shape).numel() for shape in shapes]
        # What is held already is used again: torch keeps pinned memory that it was given back, so it wouldn't show as
        # free.
        check_room(max(sum(sizes) * dtype.itemsize - self.num_bytes, 0), self._place)
        self._states = []
        if self._place == "disk":
            parts = iter(_file_backed(sum(sizes), dtype).split(sizes))
        else:
            parts = _slabs(sizes, dtype, pinned=pinned)
        self._states = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def read(self, device: torch.device) -> Iterator[torch.Tensor]:
        """Bring in one pass after the other.

        :param device: device to bring them to
        :return: (B, T, d) each, a copy: there are blocks that add to their input in place
        """
        if device.type != "cuda":
            yield from (state.to(device, copy=True) for state in self._states)
            return
        computing = torch.cuda.current_stream(device)
        coming = self._fetch(0, device)
        computed: deque[torch.cuda.Event] = deque()
        for index in range(len(self._states)):
            hidden, arrived = coming
            # Not for all of the copy stream: outputs of the last pass may still be on their way.
            computing.wait_event(arrived)
            # Allocated on the copy stream, which must not give the memory away before this stream is done with it.
            hidden.record_stream(computing)
            if index + 1 < len(self._states):
                coming = self._fetch(index + 1, device)
            yield hidden
            computed.append(computing.record_event())
            if len(computed) > PASSES_AHEAD:
                computed.popleft().synchronize()

    def get(self, index: int, device: torch.device) -> torch.Tensor:
        """Bring in one pass, in any order; what was written must have settled.

        :param index: number of the pass
        :param device: device to bring it to
        :return: (B, T, d), a copy
        """
        return self._states[index].to(device, copy=True, non_blocking=True)

    def write(self, index: int, hidden: torch.Tensor) -> None:
        """Replace the hidden states of a pass by those after the block.

        :param index: number of the pass
        :param hidden: (B, T, d), on the device of the blocks
        """
        if hidden.device.type != "cuda":
            self._states[index].copy_(hidden)
            return
        copying = self._stream(hidden.device)
        copying.wait_stream(torch.cuda.current_stream(hidden.device))
        with torch.cuda.stream(copying):
            self._states[index].copy_(hidden, non_blocking=True)
        hidden.record_stream(copying)

    def settle(self) -> None:
        """Wait for all copies, so that another device may read the states."""
        for stream in self._streams.values():
            stream.synchronize()

    def _fetch(self, index: int, device: torch.device) -> tuple[torch.Tensor, torch.cuda.Event]:
        copying = self._stream(device)
        with torch.cuda.stream(copying):
            hidden = self._states[index].to(device, non_blocking=True)
        return hidden, copying.record_event()

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def _slabs(sizes: Sequence[int], dtype: torch.dtype, *, pinned: bool) -> Iterator[torch.Tensor]:
    room = torch.empty(0, dtype=dtype)
    for size in sizes:
        if size > len(room):
            room = torch.empty(max(size, SLAB_BYTES // dtype.itemsize), dtype=dtype, pin_memory=pinned)
        part, room = room[:size], room[size:]
        yield part


def _file_backed(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in a file that has no name any more, so that nothing is left behind whatever ends the process."""
    num_bytes = max(numel, 1) * dtype.itemsize
    descriptor, name = tempfile.mkstemp(prefix="sinkprune-hidden-states-")
    try:
        with contextlib.suppress(AttributeError):
            # Not on macOS. Reserved at once: a file with holes on a full disk would end in a bus error.
            os.posix_fallocate(descriptor, 0, num_bytes)
        os.ftruncate(descriptor, num_bytes)
        return torch.from_file(name, shared=True, size=numel, dtype=dtype)
    except OSError as error:
        raise UsageError(
            f"the hidden states of all calibration passes take {num_bytes / 1e9:.1f} GB and can't be written to "
            f"{Path(name).parent}: {error.strerror}; set TMPDIR to a directory on a larger disk"
        ) from error
    finally:
        os.close(descriptor)
        Path(name).unlink()
