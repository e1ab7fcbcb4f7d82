"""Sparse weights on their way into vLLM: parts to dense weights, tensor-parallel slices, the choice of the kernel."""

import json
import sys

import pytest
import torch
from checkpoint_maker import two_of_four, unstructured
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import bitmask, bitmask24
from sinkprune_plugin.formats.format_names import CheckpointFormat
from sinkprune_plugin.vllm.sparse_weights import complete_weights, dense_weights, sparsity_of

DENSE, BITMASK, TWO_OF_FOUR = CheckpointFormat
COMPRESS = {BITMASK: bitmask.compress, TWO_OF_FOUR: bitmask24.compress}
SPARSE = (BITMASK, TWO_OF_FOUR)


def in_parts(name, weight, sparse_format):
    return [(f"{name}.{part}", tensor) for part, tensor in COMPRESS[sparse_format](weight).items()]


def same_bytes(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# --- the stream


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_order_of_parts(data):
    """Parts of many weights and whole tensors, shuffled as shards may shuffle them."""
    sparse_format = data.draw(st.sampled_from(SPARSE))
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    expected, stream = {}, []
    for number in range(data.draw(st.integers(1, 6))):
        make = two_of_four if sparse_format is TWO_OF_FOUR else unstructured
        rows, columns = data.draw(st.integers(1, 9)), 4 * data.draw(st.integers(1, 6))
        weight = make(rows, columns, dtype=torch.float32).to(data.draw(st.sampled_from(dtypes)))
        expected[f"layers.{number}.q_proj.weight"] = weight
        stream += in_parts(f"layers.{number}.q_proj", weight, sparse_format)
        expected[f"layers.{number}.norm.weight"] = torch.randn(3)
        stream.append((f"layers.{number}.norm.weight", expected[f"layers.{number}.norm.weight"]))
    found = list(dense_weights(iter(data.draw(st.permutations(stream))), sparse_format))
    assert len(found) == len(expected)
    for name, tensor in found:
        assert same_bytes(tensor, expected[name]), name


@pytest.mark.parametrize("sparse_format", SPARSE)
def test_each_weight_comes_as_soon_as_it_is_complete(sparse_format):
    """So that no more than one weight is sparse and dense at a time."""
    taken = []

    def source():
        for number in range(3):
            for name, tensor in in_parts(f"a.{number}", two_of_four(4, 8), sparse_format):
                taken.append(name)
                yield name, tensor

    for number, (name, _) in enumerate(dense_weights(source(), sparse_format)):
        assert name == f"a.{number}.weight"
        assert len(taken) == (number + 1) * len(sparse_format.parts)


def test_prefixes_with_the_full_name():
    """compressed-tensors before 0.9 compressed every tensor and kept its whole name in front."""
    weight, bias = unstructured(4, 8), torch.tensor([0.0, 1.0, 0.0, 2.0])
    parts = [(f"q.weight.{part}", tensor) for part, tensor in bitmask.compress(weight).items()]
    bias_parts = {
        "compressed": bias[bias != 0],
        "bitmask": torch.tensor([0b1010], dtype=torch.uint8),
        "shape": torch.tensor([4]),
        "row_offsets": torch.tensor(0),
    }
    parts += [(f"q.bias.{part}", tensor) for part, tensor in bias_parts.items()]
    found = dict(dense_weights(parts, BITMASK))
    assert found.keys() == {"q.weight", "q.bias"}
    assert same_bytes(found["q.weight"], weight)
    assert torch.equal(found["q.bias"], bias)


@pytest.mark.parametrize("sparse_format", SPARSE)
def test_every_part_is_missed(sparse_format):
    whole = in_parts("m.layers.0.q_proj", two_of_four(4, 8), sparse_format)
    for part in sparse_format.parts:
        stream = [(name, tensor) for name, tensor in whole if not name.endswith(f".{part}")]
        with pytest.raises(UsageError, match=rf"^m\.layers\.0\.q_proj\.weight: m.*q_proj\.{part}.*in no file"):
            list(dense_weights(stream, sparse_format))


def flip(parts):
    parts["bitmask"] = parts["bitmask"] ^ 1


def shorten(parts):
    parts["compressed"] = parts["compressed"][:-1]


def retype(parts):
    parts["compressed"] = parts["compressed"].double()


def enlarge(parts):
    parts["shape"] = parts["shape"] * 1_000_000


@pytest.mark.parametrize("damage", [flip, shorten, retype, enlarge])
@pytest.mark.parametrize("sparse_format", SPARSE)
def test_damage_names_the_tensor(sparse_format, damage):
    torch.manual_seed(0)
    parts = COMPRESS[sparse_format](two_of_four(6, 16))
    damage(parts)
    stream = [(f"m.layers.3.up_proj.{part}", tensor) for part, tensor in parts.items()]
    with pytest.raises(UsageError, match=r"^m\.layers\.3\.up_proj\.weight: ") as caught:
        list(dense_weights(stream, sparse_format))
    assert "\n" not in str(caught.value)


def test_wrong_row_offsets():
    parts = bitmask.compress(unstructured(6, 16))
    parts["row_offsets"][2] += 1
    with pytest.raises(UsageError, match=r"q\.weight: row_offsets\[2\]"):
        list(dense_weights([(f"q.{part}", tensor) for part, tensor in parts.items()], BITMASK))


def test_a_weight_that_is_stored_twice_is_refused():
    weight = two_of_four(4, 8)
    parts = in_parts("q", weight, BITMASK)
    for stream in (parts + parts, [("q.weight", weight), *parts], [*parts, ("q.weight", weight)]):
        with pytest.raises(UsageError, match=r"^q\.\w+ is stored twice"):
            list(dense_weights(stream, BITMASK))


def test_wrong_format_in_the_configuration():
    # In the order of a file.
    parts = sorted(in_parts("q", two_of_four(4, 8), BITMASK), key=lambda part: part[0])
    with pytest.raises(UsageError, match="row_offsets isn't a part of sparse-24-bitmask"):
        list(dense_weights(parts, TWO_OF_FOUR))
    with pytest.raises(UsageError, match=r"q\.bitmask is part of a sparse weight"):
        list(dense_weights(parts, DENSE))
    # Such a name by itself is nothing wrong.
    stream = [("vision.shape", torch.ones(2)), ("q.weight", torch.ones(2))]
    assert [name for name, _ in dense_weights(stream, DENSE)] == ["vision.shape", "q.weight"]


def test_a_whole_tensor_missing():
    stream = [("a.weight", torch.ones(1)), ("extra", torch.ones(1))]
    assert list(complete_weights(stream, ["a.weight"])) == stream
    with pytest.raises(UsageError, match=r"b\.weight and 1 more are in no file"):
        list(complete_weights(stream, ["a.weight", "c.weight", "b.weight"]))


# --- the configuration


class Config:
    def __init__(self, **blocks):
        self.__dict__.update(blocks)


def format_of(config):
    found = sparsity_of(config)
    return None if found is None else found.format


def test_format_of_a_configuration():
    sparsity = {"format": "sparse-24-bitmask", "targets": ["Linear"]}
    ours = {"quant_method": "compressed-tensors-sparse", "sparsity_config": sparsity}
    legacy = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    assert format_of(Config(quantization_config=ours)) is TWO_OF_FOUR
    assert format_of(Config(quantization_config=legacy)) is TWO_OF_FOUR
    assert format_of(Config(compression_config={"sparsity_config": sparsity})) is TWO_OF_FOUR
    # As vLLM leaves it behind.
    empty = {"quant_method": "", "sparsity_config": sparsity}
    assert format_of(Config(compression_config=empty)) is TWO_OF_FOUR
    assert format_of(Config(text_config=Config(quantization_config=legacy))) is TWO_OF_FOUR
    assert format_of(Config(quantization_config={"quant_method": "gptq", "bits": 4})) is None
    assert format_of(Config(quantization_config=None)) is None
    assert format_of(Config()) is None


@pytest.mark.parametrize("name", ["{module}:Thing", "sparse_bitmask", None, 7, ["sparse-bitmask"]])
def test_hostile_format_is_never_imported(name, tmp_path, monkeypatch):
    module = "a_hostile_module"
    (tmp_path / f"{module}.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    name = name.format(module=module) if isinstance(name, str) else name
    block = {"quant_method": "compressed-tensors-sparse", "sparsity_config": {"format": name}}
    with pytest.raises(UsageError, match=r"sparsity_config\.format"):
        format_of(Config(quantization_config=block))
    config_class = sparse_config_class()
    with pytest.raises(UsageError, match=r"sparsity_config\.format"):
        config_class.from_config(block)
    assert module not in sys.modules


def sparse_config_class():
    pytest.importorskip("vllm", reason="vLLM isn't installed; see README, Versions")
    from sinkprune_plugin.vllm.sparse_quantization import SparseConfig

    return SparseConfig


def test_who_takes_a_configuration():
    take = sparse_config_class().override_quantization_method
    sparsity = {"format": "sparse-bitmask"}
    assert take({"quant_method": "compressed-tensors", "sparsity_config": sparsity}, None) == (
        "compressed-tensors-sparse"
    )
    assert take({"quant_method": "", "sparsity_config": sparsity}, None) == "compressed-tensors-sparse"
    assert take({"quant_method": "compressed-tensors"}, None) is None
    assert take({"quant_method": "compressed-tensors", "sparsity_config": {}}, None) is None
    assert take({"quant_method": "gptq", "sparsity_config": sparsity}, None) is None


def test_stacked_configuration_becomes_vllms_own():
    config_class = sparse_config_class()
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    activations = weights | {"strategy": "token", "dynamic": True}
    block = {
        "quant_method": "compressed-tensors-sparse",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
        "ignore": ["lm_head"],
        "sparsity_config": {"format": "sparse-24-bitmask", "targets": ["Linear"], "ignore": []},
        "sinkprune_version": "1.0",
    }
    before = json.dumps(block)
    made = config_class.from_config(block)
    assert type(made) is CompressedTensorsConfig
    assert list(made.target_scheme_map) == ["Linear"]
    assert made.ignore == ["lm_head"]
    assert json.dumps(block) == before
    sparse_only = {key: block[key] for key in ("quant_method", "sparsity_config", "sinkprune_version")}
    assert type(config_class.from_config(sparse_only)) is config_class
    assert type(config_class.from_config({**sparse_only, "quant_method": ""})) is config_class
    with pytest.raises(UsageError, match="transform_config"):
        config_class.from_config({**sparse_only, "transform_config": {"config_groups": {"a": 1}}})


# --- tensor parallelism: vLLM cuts its slices from the dense stream


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
        # 2:4 along the columns, which are cut here: 12 of 24 for each rank.
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


# --- the 2:4 kernel


@pytest.fixture
def sparse_linear():
    pytest.importorskip("vllm", reason="vLLM isn't installed; see README, Versions")
    from sinkprune_plugin.vllm import sparse_linear

    return sparse_linear


def test_choice_of_the_kernel(sparse_linear):
    assert sparse_linear.is_faster([1.0, 2.0, 4.0], [0.7, 1.3, 2.6])
    # Slower where it is slow by more than it is faster elsewhere, and not for a gain within the noise.
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
    # Nothing of this machine's weights is, without a GPU.
    assert torch.cuda.is_available() or not sparse_linear.runs_sparse(two_of_four(64, 128))


def as_the_kernel(packed, dense, bias=None, transpose_result=False):
    """What ``torch._cslt_sparse_mm`` does and demands, on a "compressed" weight that is a mere copy."""
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
