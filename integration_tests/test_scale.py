"""The estimate for models of real size, compared with what a small model really does."""

import sys

import pytest
import torch
from golden_data import RECIPES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model
from sinkprune_plugin.models.decoder_blocks import find_decoder_blocks
from sinkprune_plugin.modifiers.bare_modules import bare_copy, compute_with
from sinkprune_plugin.modifiers.blockwise_recovery import BlockwiseRecoveryModifier
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


def test_a_block_of_an_8b_model_is_trained_on_one_24_gb_gpu():
    """LLaDA-8B on the meta device, in bfloat16, with passes of 4096 tokens."""
    with torch.device("meta"):
        config = AutoConfig.for_model("llada", d_model=4096, n_layers=32, n_heads=32, mlp_hidden_size=12288)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        hidden = torch.empty(1, 4096, 4096, dtype=torch.bfloat16)
        tables = (torch.empty(4096, 128), torch.empty(4096, 128))
    estimate = BlockwiseRecoveryModifier().estimate(model, 128, 128 * 4096)
    # A weight takes 22 bytes (tests/modifiers/test_block_fit.py counts them), and a block has 218 million.
    assert estimate.training_bytes == 22 * (4 * 4096**2 + 3 * 4096 * 12288) == 4_798_283_776
    # Both models' hidden states at ten timesteps, in main memory or on disk.
    assert estimate.hidden_bytes == 2 * 10 * 128 * 4096 * 4096 * 2
    bare = bare_copy(find_decoder_blocks(model)[1][0])
    weights = {name: torch.empty_like(each, requires_grad=each.dim() == 2) for name, each in bare.named_parameters()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        compute_with(bare, weights, hidden, None, tables)
    storages = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in saved}
    activations = sum(storages.values())
    # The attention matrix of 32 × 4096² float32 among them, which the meta device keeps and a GPU's kernels don't. Were
    # they to, the backward pass would have two more of them.
    matrix = 32 * 4096**2 * 4
    assert activations < 3.3e9
    assert estimate.training_bytes + activations + 2 * matrix < 24e9
