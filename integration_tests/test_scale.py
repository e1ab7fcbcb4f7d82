"""The estimate for models of real size, compared with what a small model really does."""

import sys

import pytest
import torch
from golden_data import RECIPES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model
from sinkprune_plugin.modifiers.sparsegpt import SinkAwareSparseGPTModifier

sys.path.insert(0, str(RECIPES.parent / "benchmarks"))
import scale


@pytest.fixture(scope="module")
def counted():
    model = scale.build(str(EMBEDDED_MODEL))
    assert next(model.parameters()).device.type == "meta"
    estimate = SinkAwareSparseGPTModifier(sparsity=0.5).estimate(model, 3, 3 * 128)
    return scale.count(model, "sparsegpt", estimate, 128)


def test_forward_operations_are_those_that_torch_counts(counted):
    model = load_model(EMBEDDED_MODEL, torch.float32)
    counter = FlopCounterMode(display=False)
    # torch's counter doesn't know the fused kernel of the CPU.
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(input_ids=torch.zeros(1, 128, dtype=torch.long))
    head = model.get_output_embeddings()
    of_blocks = counter.get_total_flops() - 2 * 128 * head.in_features * head.out_features
    # 30 passes through all blocks, three times each.
    assert counted["forward operations"] == 30 * 3 * of_blocks


def test_inputs_that_linears_share_are_counted_once(counted):
    # q/k/v, attention's output, gate/up: 192 columns each; the MLP's output 512.
    assert counted["Hessians on the card"] == 4 * (3 * 192**2 + 512**2)
    assert counted["Hessian operations"] == 6 * 30 * 128 * 2 * (3 * 192**2 + 512**2)


def test_hidden_states_cross_the_bus_for_every_run(counted):
    # bfloat16. First sweep: in and out; second: in for the statistics, in and out for the next block.
    assert counted["hidden states moved"] == 30 * 128 * 192 * 2 * 6 * (2 + 3)
