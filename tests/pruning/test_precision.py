import pytest
import torch
from pruning_cases import make_layer, prepared

from sinkprune_plugin.pruning import admm
from sinkprune_plugin.pruning.admm import ADMMOptions, solve
from sinkprune_plugin.pruning.patterns import MaskStructure
from sinkprune_plugin.pruning.precision import steering_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("features", "dtype"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False}, torch.float32),
        # Another architecture names other features.
        ({"neon": True}, torch.float32),
    ],
)
def test_a_cpu_multiplies_bfloat16_where_it_can(monkeypatch, features, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert steering_dtype(CPU) == dtype


def test_a_torch_that_names_no_features_multiplies_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert steering_dtype(CPU) == torch.float32


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_multiplies_bfloat16_where_it_is_not_emulated(monkeypatch, native, dtype):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **fields: asked.append(fields) or native)
    assert steering_dtype(GPU) == dtype
    assert asked == [{"including_emulation": False}]


def test_other_devices_multiply_float32():
    assert steering_dtype(torch.device("mps")) == torch.float32


@pytest.mark.parametrize("structure", [MaskStructure(0, 0), MaskStructure(2, 4)])
def test_rounded_products_cost_no_accuracy(monkeypatch, structure):
    """Both dtypes on this machine, whatever it chooses: emulated bfloat16 gives the same numbers."""
    differences = []
    for seed in range(8):
        W, _, H = make_layer(seed, 48, 96)
        losses = {}
        for dtype in (torch.float32, torch.bfloat16):
            monkeypatch.setattr(admm, "steering_dtype", lambda device, dtype=dtype: dtype)
            pruned, losses[dtype] = solve(W, prepared(H), 0.5, structure)
            assert int((pruned == 0).sum()) == W.numel() // 2
        differences.append(losses[torch.bfloat16] / losses[torch.float32] - 1)
    # Near ties fall to either side and move a single loss by 1.3 % here, in both directions; on average it is nothing.
    assert max(map(abs, differences)) < 0.03
    assert abs(sum(differences) / len(differences)) < 0.01


def test_final_weights_have_float32_accuracy():
    """Enough conjugate gradients leave nothing of the rounding in the weights."""
    W, _, H = make_layer(3, 16, 32)
    hessian = prepared(H)
    pruned, loss = solve(W, hessian, 0.5, MaskStructure(0, 0), ADMMOptions(refine_iterations=200))
    gradient = (pruned * hessian.scale - W * hessian.scale) @ hessian.normalised
    # At the optimum the gradient is zero where a weight is kept; float32 sums of 32 terms.
    assert gradient[pruned != 0].abs().max() < 1e-5 * gradient[pruned == 0].abs().max()
    assert loss > 0
