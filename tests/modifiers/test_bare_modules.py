"""A module without its weights computes what the module does, with the weights that it is given."""

import torch
from compressed_tensors.offload import offload_module

from sinkprune_plugin.modifiers.bare_modules import bare_copy, compute_with


class Block(torch.nn.Module):
    def __init__(self, heads=2):
        super().__init__()
        self.heads = heads
        self.inner = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU())
        self.out = torch.nn.Linear(6, 4, bias=False)
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x, *, scale=1.0):
        return self.out(self.inner(x)) * scale + self.table * self.heads


def tensors_of(module):
    return {name: each.detach().clone() for name, each in [*module.named_parameters(), *module.named_buffers()]}


def test_it_computes_with_weights_given_for_the_call():
    block, other, x = Block(), Block(), torch.randn(2, 3, 4)
    bare = bare_copy(block)
    assert all(each.device.type == "meta" for each in [*bare.parameters(), *bare.buffers()])
    for source in (block, other):
        found = compute_with(bare, tensors_of(source), x, scale=2.0)
        torch.testing.assert_close(found, source(x, scale=2.0), rtol=0, atol=0)


def test_hooks_and_offloading_stay_behind():
    block, x = Block(), torch.randn(2, 4)
    tensors, expected = tensors_of(block), block(x)
    called = []
    block.out.register_forward_hook(lambda *_: called.append("after"))
    block.inner[0].register_forward_pre_hook(lambda *_: called.append("before"))
    for module in (block, block.inner[0], block.out):
        offload_module(module, "cpu", "cpu")
    bare = bare_copy(block)
    torch.testing.assert_close(compute_with(bare, tensors, x), expected, rtol=0, atol=0)
    assert not called
    # The original is as it was.
    torch.testing.assert_close(block(x), expected, rtol=0, atol=0)
    assert called == ["before", "after"]


def test_it_keeps_the_shape_that_the_module_had():
    block, x = Block(), torch.randn(2, 4)
    bare, tensors, expected = bare_copy(block), tensors_of(block), block(x)
    block.heads = 1
    block.inner[0] = torch.nn.Linear(4, 3)
    block.out = torch.nn.Linear(3, 4, bias=False)
    torch.testing.assert_close(compute_with(bare, tensors, x), expected, rtol=0, atol=0)
    smaller = bare_copy(block)
    torch.testing.assert_close(compute_with(smaller, tensors_of(block), x), block(x), rtol=0, atol=0)


def test_gradients_reach_the_given_weights():
    block, x = Block(), torch.randn(2, 4)
    tensors = tensors_of(block)
    tensors["out.weight"].requires_grad_()
    compute_with(bare_copy(block), tensors, x).sum().backward()
    assert tensors["out.weight"].grad.abs().sum() > 0
    assert block.out.weight.grad is None
