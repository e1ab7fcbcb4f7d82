"""The device that a user asks for, and the one on which a loaded model takes its input."""

import pytest
import torch
from compressed_tensors.offload import set_onload_device

from sinkprune_plugin import devices
from sinkprune_plugin.devices import choose_device, input_device
from sinkprune_plugin.errors import UsageError


@pytest.fixture
def machine(monkeypatch):
    """Function that makes torch see a kind of accelerator, or none."""

    def see(kind, count=1):
        found = (torch.device(kind), count) if kind else (None, 0)
        monkeypatch.setattr(devices, "_accelerators", lambda: found)

    return see


@pytest.mark.parametrize(
    ("kind", "wanted", "chosen"),
    [
        (None, "auto", "cpu"),
        (None, "cpu", "cpu"),
        ("cuda", "auto", "cuda"),
        ("cuda", "cpu", "cpu"),
        ("cuda", "cuda:1", "cuda:1"),
        ("cuda", "cuda", "cuda"),
        ("mps", "auto", "mps"),
        ("mps", "mps", "mps"),
    ],
)
def test_the_device_asked_for_is_chosen_and_auto_takes_an_accelerator(machine, kind, wanted, chosen):
    machine(kind, count=2)
    assert choose_device(wanted) == torch.device(chosen)


@pytest.mark.parametrize(
    ("kind", "wanted", "message"),
    [
        (None, "cuda", "device 'cuda' isn't there: torch sees no accelerator; use auto or cpu"),
        (None, "cuda:0", "device 'cuda:0' isn't there: torch sees no accelerator"),
        ("mps", "cuda", "torch sees mps only"),
        ("cuda", "cuda:2", "device 'cuda:2' isn't there: torch sees 2 of them; use cuda:1"),
        ("cuda", "abacus", "device 'abacus' is unknown; use auto, cpu, cuda or cuda:0"),
        ("cuda", "cuda:x", "device 'cuda:x' is unknown"),
        ("cuda", "cuda:-1", "device 'cuda:-1' is unknown"),
        ("cuda", "meta", "device 'meta' isn't there"),
        ("cuda", "", "device '' is unknown"),
    ],
)
def test_a_device_that_is_not_there_is_refused(machine, kind, wanted, message):
    machine(kind, count=2)
    with pytest.raises(UsageError, match=message):
        choose_device(wanted)


def test_without_a_wish_torch_is_asked_for_an_accelerator():
    expected = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    assert choose_device() == expected


class WithEmbedding(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(2, 2, device="meta")
        self.embedding = torch.nn.Embedding(4, 2)

    def get_input_embeddings(self):
        return self.embedding


def test_the_embedding_decides_where_input_goes():
    model = WithEmbedding()
    assert next(model.parameters()).device.type == "meta"
    assert input_device(model) == torch.device("cpu")
    assert input_device(torch.nn.ReLU()) == torch.device("cpu")


def test_weights_that_accelerate_offloaded_take_input_on_the_cpu():
    assert input_device(WithEmbedding().first) == torch.device("cpu")


def test_weights_that_compressed_tensors_brings_to_a_device_take_input_there():
    model = WithEmbedding()
    # "meta" represents an accelerator that this machine may not have.
    set_onload_device(model.embedding, torch.device("meta"))
    assert input_device(model) == torch.device("meta")
