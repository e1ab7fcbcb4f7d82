"""Sparse weights in vLLM's layers: tensor-parallel slices, the choice of the 2:4 kernel, the kernel."""

import pytest
import torch
from checkpoint_maker import two_of_four
from sparse_parts import SPARSE, in_parts
from torch.nn import functional as F

from sinkprune_plugin.vllm.sparse_weights import dense_weights


@pytest.fixture
def pretend(monkeypatch):
    """Function that makes vLLM take this process for one tensor-parallel rank of several; at first the only one."""
    pytest.importorskip("vllm", reason="vLLM isn't installed; see README, Versions")
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear

    def become(rank, ranks):
        for module in (linear, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: ranks)

    become(0, 1)
    with set_current_vllm_config(VllmConfig()):
        yield become


@pytest.mark.parametrize("sparse_format", SPARSE)
@pytest.mark.parametrize("rank", [0, 1])
def test_slices_of_two_ranks(sparse_format, rank, pretend):
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

    torch.manual_seed(0)
    weights = {
        "q_proj": two_of_four(32, 32, torch.float32),
        "k_proj": two_of_four(16, 32, torch.float32),
        "v_proj": two_of_four(16, 32, torch.float32),
        "gate_proj": two_of_four(24, 32, torch.float32),
        "up_proj": two_of_four(24, 32, torch.float32),
        # 2:4 along the columns, which are split here: 12 of 24 for each rank.
        "down_proj": two_of_four(32, 24, torch.float32),
    }
    pretend(rank, 2)
    qkv = QKVParallelLinear(32, 8, 4, 2, bias=False, params_dtype=torch.float32)
    gate_up = MergedColumnParallelLinear(32, [24, 24], bias=False, params_dtype=torch.float32)
    down = RowParallelLinear(24, 32, bias=False, params_dtype=torch.float32)
    places = {"q_proj": (qkv, "q"), "k_proj": (qkv, "k"), "v_proj": (qkv, "v")}
    places |= {"gate_proj": (gate_up, 0), "up_proj": (gate_up, 1), "down_proj": (down,)}
    stream = [part for name, weight in weights.items() for part in in_parts(name, weight, sparse_format)]
    for name, tensor in dense_weights(stream, sparse_format):
        layer, *shard = places[name.removesuffix(".weight")]
        layer.weight.weight_loader(layer.weight, tensor, *shard)

    half = {name: weight.chunk(2, dim=0)[rank] for name, weight in weights.items()}
    assert torch.equal(qkv.weight, torch.cat([half["q_proj"], half["k_proj"], half["v_proj"]]))
    assert torch.equal(gate_up.weight, torch.cat([half["gate_proj"], half["up_proj"]]))
    assert torch.equal(down.weight, weights["down_proj"].chunk(2, dim=1)[rank])


@pytest.fixture
def sparse_linear():
    pytest.importorskip("vllm", reason="vLLM isn't installed; see README, Versions")
    from sinkprune_plugin.vllm import sparse_linear

    return sparse_linear


def test_choice_of_the_kernel(sparse_linear):
    assert sparse_linear.is_faster([1.0, 2.0, 4.0], [0.7, 1.3, 2.6])
    # Refused if its losses outweigh its gains, and for a gain within the noise.
    assert not sparse_linear.is_faster([1.0, 1.0, 1.0], [2.5, 0.8, 0.7])
    assert not sparse_linear.is_faster([1.0, 1.0, 1.0], [0.97, 0.98, 0.96])
    assert sparse_linear.is_faster([1.0, 1.0, 1.0], [1.2, 0.7, 0.7])


@pytest.mark.parametrize(
    ("shape", "dtype", "fits"),
    [
        ((4096, 4096), torch.bfloat16, True),
        ((12288, 4096), torch.float16, True),
        ((4096, 4096), torch.float32, False),
        ((4096, 4096), torch.int8, False),
        ((4096 + 16, 4096), torch.bfloat16, False),
        ((4096, 4096 + 32), torch.bfloat16, False),
        ((0, 64), torch.bfloat16, False),
    ],
)
def test_shapes_of_the_kernel(shape, dtype, fits, sparse_linear):
    assert sparse_linear.fits_kernel(shape, dtype) is fits


def test_only_two_of_four_is_compressed(sparse_linear):
    weight = two_of_four(64, 128)
    assert sparse_linear.is_two_of_four(weight)
    # As tensor parallelism cuts it: along the rows, and along whole groups of the columns.
    assert sparse_linear.is_two_of_four(weight[:32])
    assert sparse_linear.is_two_of_four(weight[:, 64:])
    weight[5, 8:11] = 1
    assert not sparse_linear.is_two_of_four(weight)
    # Without a GPU no weight is.
    assert torch.cuda.is_available() or not sparse_linear.runs_sparse(two_of_four(64, 128))


def as_the_kernel(packed, dense, bias=None, transpose_result=False):
    """What ``torch._cslt_sparse_mm`` does and requires, on a "compressed" weight that is only a copy."""
    assert bias is None
    assert dense.shape[1] % 8 == 0
    product = packed @ dense
    return product.t().contiguous() if transpose_result else product


@pytest.mark.parametrize("tokens", [1, 7, 8, 30])
def test_layer_on_an_emulated_kernel(tokens, sparse_linear, pretend, monkeypatch):
    """Padding, bias, leading dimensions and the exchange of the weight; the kernel itself is tested on a GPU."""
    monkeypatch.setattr(torch, "_cslt_compress", torch.clone)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", as_the_kernel)
    monkeypatch.setattr(sparse_linear, "runs_sparse", lambda weight: True)
    layer = torch.nn.Module()
    method = sparse_linear.Sparse24LinearMethod()
    method.create_weights(layer, 64, [32], 64, 32, torch.float32, weight_loader=None)
    weight = two_of_four(32, 64, torch.float32)
    layer.weight.data.copy_(weight)
    method.process_weights_after_loading(layer)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    x, bias = torch.randn(tokens, 64), torch.randn(32)
    for out, expected in [
        (method.apply(layer, x), F.linear(x, weight)),
        (method.apply(layer, x, bias), F.linear(x, weight, bias)),
        (method.apply(layer, x[None], bias), F.linear(x[None], weight, bias)),
    ]:
        # The same sums of 64 products, possibly in another order.
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
        assert out.is_contiguous()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGpu:
    @pytest.fixture(autouse=True)
    def _needs_sparse_tensor_cores(self, sparse_linear):
        if not sparse_linear.sparse_tensor_cores():
            pytest.skip("needs compute capability 8.0 and cuSPARSELt")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("tokens", [1, 8, 37, 1024])
    def test_the_sparse_product_equals_the_dense_one(self, tokens, dtype, sparse_linear):
        torch.manual_seed(0)
        weight = two_of_four(384, 512, torch.float32).div(100).to(dtype).cuda()
        x = torch.randn(tokens, 512, dtype=dtype, device="cuda")
        out = sparse_linear.sparse_product(x, torch._cslt_compress(weight), 384)
        # Both round a float32 sum once, to 8 bits (bfloat16); sums in another order differ by one unit of that.
        torch.testing.assert_close(out, F.linear(x, weight), rtol=2e-2, atol=5e-2)

    def test_layer_keeps_one_copy(self, sparse_linear, pretend, monkeypatch):
        monkeypatch.setattr(sparse_linear, "_worth_it", lambda *shape: True)
        with torch.device("cuda"):
            layer = torch.nn.Module()
            method = sparse_linear.Sparse24LinearMethod()
            method.create_weights(layer, 1024, [2048], 1024, 2048, torch.bfloat16, weight_loader=None)
        weight = two_of_four(2048, 1024).cuda() / 100
        layer.weight.data.copy_(weight)
        method.process_weights_after_loading(layer)
        # Half of the values and two bits for each of them.
        assert layer.weight.nbytes < 0.6 * weight.nbytes
        x = torch.randn(100, 1024, dtype=torch.bfloat16, device="cuda")
        torch.testing.assert_close(method.apply(layer, x), F.linear(x, weight), rtol=2e-2, atol=5e-2)

    def test_the_sparse_product_compiles_for_any_number_of_tokens(self, sparse_linear):
        weight = two_of_four(256, 512).cuda() / 100
        packed, product = torch._cslt_compress(weight), sparse_linear._register_op()[1]
        compiled = torch.compile(lambda x: product(x, packed, 256) * 2, dynamic=True, fullgraph=True)
        for tokens in (8, 13, 256):
            x = torch.randn(tokens, 512, dtype=torch.bfloat16, device="cuda")
            torch.testing.assert_close(compiled(x), F.linear(x, weight) * 2, rtol=2e-2, atol=1e-1)

    def test_the_kernels_are_timed_without_an_error(self, sparse_linear):
        # Whichever it is; large products gain on every GPU that has sparse tensor cores, but that is no promise.
        assert sparse_linear._worth_it(4096, 4096, torch.bfloat16, torch.device("cuda")) in (True, False)
