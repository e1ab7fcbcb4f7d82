"""Zeros stay zeros, bit for bit, whatever trains the weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recovery_cases import prune, small_model

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.decoder_blocks import block_linears
from sinkprune_plugin.recovery.fixed_zeros import FixedZeros


class FillsEverything(torch.optim.Optimizer):
    """An update that doesn't depend on the gradient, as noise or a mixing of rows would give."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(0.01)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
    "fills everything": FillsEverything,
}


def step(model, optimizer, restore):
    ids = torch.randint(3, 40, (2, 8))
    logits = model(input_ids=ids).logits
    torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten()).backward()
    optimizer.step()
    restore()
    optimizer.zero_grad()


@settings(max_examples=12)
@given(
    name=st.sampled_from(sorted(OPTIMIZERS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    pattern=st.sampled_from(["unstructured", "2:4"]),
    steps=st.integers(1, 3),
)
def test_no_optimizer_fills_a_zero(name, dtype, pattern, steps):
    model = prune(small_model(vocab_size=40), pattern).to(dtype).train()
    # A negative zero is a zero: it becomes the positive one that all formats give back.
    first = next(iter(block_linears(model).values()))
    with torch.no_grad():
        first.weight[first.weight == 0] = -0.0
    zeros = FixedZeros(model)
    before = {n: m.weight.detach().clone() for n, m in block_linears(model).items()}
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    restore = zeros.attach(model)
    for _ in range(steps):
        step(model, optimizer, restore)
    for n, module in block_linears(model).items():
        fixed = zeros.of(f"{n}.weight")
        assert torch.equal(fixed, before[n] == 0)
        width = torch.int32 if dtype == torch.float32 else torch.int16
        assert not module.weight.detach()[fixed].view(width).any(), n
        assert not torch.equal(module.weight, before[n]), "the others must move, or nothing was trained"
    zeros.require(model.state_dict(), "the model")


def test_the_optimizer_never_sees_a_gradient_there():
    model = prune(small_model(vocab_size=40)).train()
    zeros = FixedZeros(model)
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer, zeros.attach(model))
    for name, module in block_linears(model).items():
        moment = optimizer.state[module.weight]["exp_avg"]
        assert not moment[zeros.of(f"{name}.weight")].any()
        assert moment.any()


def test_a_filled_zero_is_found():
    model = prune(small_model(vocab_size=40))
    zeros = FixedZeros(model)
    name, module = next(iter(block_linears(model).items()))
    place = zeros.of(f"{name}.weight").nonzero()[0]
    with torch.no_grad():
        module.weight[tuple(place)] = 1e-30
    with pytest.raises(UsageError, match=rf"the file: {name}.weight has bits set at \d+ places that were pruned"):
        zeros.require(model.state_dict(), "the file")


def test_counts_and_memory():
    model = small_model(vocab_size=40)
    assert FixedZeros(model).zeros == 0
    zeros = FixedZeros(prune(model))
    weights = [module.weight for module in block_linears(model).values()]
    assert zeros.weights == sum(weight.numel() for weight in weights)
    assert zeros.zeros == sum(int((weight == 0).sum()) for weight in weights)
    # One bit for each weight, rows padded to bytes: 0.9 GB for the 7 billion of an 8 B model.
    held = sum(packed.numel() for packed, _ in zeros._packed.values())
    assert held == sum(weight.shape[0] * -(-weight.shape[1] // 8) for weight in weights)


def test_pruned_weights_that_are_not_trained_are_refused():
    model = prune(small_model(vocab_size=40))
    zeros = FixedZeros(model)
    next(iter(block_linears(model).values())).weight.requires_grad = False
    with pytest.raises(UsageError, match="only 13 of 14 pruned weights are trained"):
        zeros.attach(model)
