"""The order of copies and computation on CUDA, on streams that only write down what would have to wait for what."""

import contextlib

import pytest
import torch

from sinkprune_plugin.modifiers import hidden_states
from sinkprune_plugin.modifiers.hidden_states import HiddenStates

CUDA = torch.device("cuda")


class Device:
    """Streams of work: each piece knows everything that is done before it can begin."""

    def __init__(self):
        self.done_by_host = set()
        self.most_waiting = 0
        self.computing, self.copying = Stream(self), Stream(self)
        self.current = self.computing


class Stream:
    def __init__(self, device):
        self.device, self.before, self.order = device, set(), {}

    def do(self, name):
        assert name not in self.order
        self.order[name] = set(self.before)
        self.before.add(name)

    def wait_stream(self, other):
        self.before |= other.before

    def record_event(self):
        return Event(self.device, set(self.before))

    def wait_event(self, event):
        self.before |= event.before

    def synchronize(self):
        self.device.done_by_host |= self.before


class Event:
    def __init__(self, device, before):
        self.device, self.before = device, before

    def synchronize(self):
        self.device.done_by_host |= self.before


class Tensor:
    """States in main memory, or what was fetched of them."""

    def __init__(self, device, index):
        self.work, self.index, self.device = device, index, CUDA
        self.used_by = []

    def to(self, _device, *, non_blocking):
        assert non_blocking
        self.work.current.do(("fetch", self.index))
        return Tensor(self.work, self.index)

    def copy_(self, _hidden, *, non_blocking):
        assert non_blocking
        self.work.current.do(("write", self.index))

    def record_stream(self, stream):
        self.used_by.append(stream)


@pytest.fixture
def device(monkeypatch):
    found = Device()

    @contextlib.contextmanager
    def stream(given):
        before, found.current = found.current, given
        yield
        found.current = before

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: found.copying)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: found.current)
    return found


def run(device, count):
    states = HiddenStates("memory")
    states._states = [Tensor(device, index) for index in range(count)]
    for index, hidden in enumerate(states.read(CUDA)):
        # Its memory is the copy stream's, and may be given away once this stream is through with it.
        assert hidden.used_by == [device.computing]
        device.computing.do(("compute", index))
        ahead = [each for each in device.computing.order if each not in device.done_by_host]
        device.most_waiting = max(device.most_waiting, len(ahead))
        output = Tensor(device, index)
        states.write(index, output)
        assert output.used_by == [device.copying]
    states.settle()


def test_a_pass_waits_for_its_own_states_and_not_for_the_last_ones_to_leave(device):
    run(device, 6)
    for index in range(6):
        before = device.computing.order["compute", index]
        assert ("fetch", index) in before
        assert ("write", index - 1) not in before
        assert ("compute", index) in device.copying.order["write", index]
        # The copy that comes next is asked for before the pass, so that it goes on meanwhile.
        if index < 5:
            assert ("compute", index) not in device.copying.order["fetch", index + 1]


def test_all_states_are_back_when_they_have_settled(device):
    run(device, 6)
    assert {("write", index) for index in range(6)} <= device.done_by_host


def test_few_passes_wait_on_the_device(device):
    """Each holds memory there for its input and its output."""
    run(device, 50)
    assert 2 <= device.most_waiting <= hidden_states.PASSES_AHEAD + 2


def test_states_can_be_read_again_after_a_block_that_adds_to_its_input():
    states = HiddenStates("memory")
    states.allocate([(1, 2, 4)], torch.float32, pinned=False)
    states.write(0, torch.ones(1, 2, 4))
    for hidden in states.read(torch.device("cpu")):
        hidden.add_(1.0)
    (again,) = states.read(torch.device("cpu"))
    assert torch.equal(again, torch.ones(1, 2, 4))
