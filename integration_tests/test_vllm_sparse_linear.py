"""Sparse weights in vLLM's layers: tensor-parallel slices, the 2:4 kernel in a layer, and who learns of its choice."""

import pytest
import torch
from checkpoint_maker import two_of_four
from sparse_parts import SPARSE, in_parts
from torch.nn import functional as F

from sinkprune_plugin.vllm.sparse_kernel import MEASURED_ROWS, KernelChoice, measure, sparse_product
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


def as_the_kernel(packed, dense, bias=None, transpose_result=False, alg_id=0):
    """What ``torch._cslt_sparse_mm`` does and requires, on a "compressed" weight that is only a copy."""
    assert bias is None
    assert dense.shape[1] % 8 == 0
    product = packed @ dense
    return product.t().contiguous() if transpose_result else product


@pytest.fixture
def sparse_linear():
    pytest.importorskip("vllm", reason="vLLM isn't installed; see README, Versions")
    from sinkprune_plugin.vllm import sparse_linear

    return sparse_linear


@pytest.mark.parametrize("tokens", [1, 7, 8, 30])
def test_layer_on_an_emulated_kernel(tokens, sparse_linear, pretend, monkeypatch):
    """Padding, bias, leading dimensions and the exchange of the weight; the kernel itself is tested on a GPU."""
    monkeypatch.setattr(torch, "_cslt_compress", torch.clone)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", as_the_kernel)
    monkeypatch.setattr(sparse_linear, "choose_kernel", lambda weight: KernelChoice(sparse=True, algorithm=3))
    layer = torch.nn.Module()
    method = sparse_linear.Sparse24LinearMethod("a.layer")
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


def hash_with(sparse_linear, monkeypatch, choice):
    """vLLM's hash of a configuration, which names its compile cache, once a layer has been loaded."""
    from vllm.config import VllmConfig, set_current_vllm_config

    monkeypatch.setattr(torch, "_cslt_compress", torch.clone)
    monkeypatch.setattr(sparse_linear, "choose_kernel", lambda weight: choice)
    config = VllmConfig()
    with set_current_vllm_config(config):
        layer, method = torch.nn.Module(), sparse_linear.Sparse24LinearMethod("a.layer")
        method.create_weights(layer, 64, [32], 64, 32, torch.float32, weight_loader=None)
    # As vLLM's loaders call it: outside of the context in which the model was built, and before it is compiled.
    method.process_weights_after_loading(layer)
    return config.compute_hash()


def test_a_compile_cache_never_meets_another_choice(sparse_linear, pretend, monkeypatch):
    choices = [KernelChoice(sparse=False), KernelChoice(sparse=True), KernelChoice(sparse=True, algorithm=3)]
    hashes = [hash_with(sparse_linear, monkeypatch, choice) for choice in choices]
    assert len(set(hashes)) == 3
    assert hash_with(sparse_linear, monkeypatch, choices[2]) == hashes[2]


class OneOfTwo:
    """The tensor-parallel group as one of its two ranks sees it."""

    world_size, cpu_group = 2, None

    def __init__(self, rank, sent):
        self.is_first_rank, self.sent = rank == 0, sent

    def broadcast_object(self, choice):
        if self.is_first_rank:
            self.sent.append(choice)
        return self.sent[-1]


def test_ranks_choose_what_the_first_one_measured(sparse_linear, pretend, monkeypatch, tmp_path):
    measured = []

    def measure(rows, columns, dtype, device):
        measured.append((rows, columns))
        return KernelChoice(sparse=True, algorithm=len(measured), gains=(1.5, 1.5, 1.5))

    monkeypatch.setattr(sparse_linear, "measure", measure)
    monkeypatch.setattr(sparse_linear, "key_of", lambda *shape: str(shape))
    monkeypatch.setattr(sparse_linear, "model_parallel_is_initialized", lambda: True)
    from vllm import envs

    # An engine that was started in this process before keeps the environment as it was then.
    envs.disable_envs_cache()
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    sent, found = [], []
    for rank in (0, 1):
        sparse_linear._choice_of_shape.cache_clear()
        monkeypatch.setattr(sparse_linear, "get_tp_group", lambda rank=rank: OneOfTwo(rank, sent))
        found.append(sparse_linear._choice_of_shape(64, 128, torch.bfloat16, torch.device("cpu")))
    assert found == [KernelChoice(True, 1, (1.5, 1.5, 1.5))] * 2
    # A later process doesn't measure at all.
    sparse_linear._choice_of_shape.cache_clear()
    monkeypatch.setattr(sparse_linear, "get_tp_group", lambda: OneOfTwo(0, sent))
    assert sparse_linear._choice_of_shape(64, 128, torch.bfloat16, torch.device("cpu")) == found[0]
    assert measured == [(64, 128)]
    assert len(list(tmp_path.rglob("two_of_four.json"))) == 1
    sparse_linear._choice_of_shape.cache_clear()


def test_without_a_gpu_every_weight_is_dense(sparse_linear):
    assert sparse_linear.choose_kernel(two_of_four(64, 128)) == KernelChoice(sparse=False)


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
        out = sparse_product(x, torch._cslt_compress(weight), 384)
        # Both round a float32 sum once, to 8 bits (bfloat16); sums in another order differ by one unit of that.
        torch.testing.assert_close(out, F.linear(x, weight), rtol=2e-2, atol=5e-2)

    def test_layer_keeps_one_copy(self, sparse_linear, pretend, monkeypatch):
        monkeypatch.setattr(sparse_linear, "_choice_of_shape", lambda *shape: KernelChoice(sparse=True))
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
        choice = measure(4096, 4096, torch.bfloat16, "cuda")
        assert len(choice.gains) == len(MEASURED_ROWS)
        x = torch.randn(64, 4096, dtype=torch.bfloat16, device="cuda")
        weight = two_of_four(4096, 4096).cuda() / 100
        out = sparse_product(x, torch._cslt_compress(weight), 4096, choice.algorithm)
        torch.testing.assert_close(out, F.linear(x, weight), rtol=2e-2, atol=5e-2)
