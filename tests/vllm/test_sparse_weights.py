"""Sparse weights in vLLM: a stream of parts becomes a stream of dense weights."""

import sys

import pytest
import torch
from checkpoint_maker import two_of_four, unstructured
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_parts import BITMASK, COMPRESS, DENSE, SPARSE, TWO_OF_FOUR, in_parts

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats.codecs import bitmask
from sinkprune_plugin.vllm.sparse_weights import complete_weights, dense_weights, sparsity_of


def same_bytes(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


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
    """compressed-tensors before 0.9 compressed every tensor and kept its full name as prefix."""
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
    # Such a name alone is valid.
    stream = [("vision.shape", torch.ones(2)), ("q.weight", torch.ones(2))]
    assert [name for name, _ in dense_weights(stream, DENSE)] == ["vision.shape", "q.weight"]


def test_a_whole_tensor_missing():
    stream = [("a.weight", torch.ones(1)), ("extra", torch.ones(1))]
    assert list(complete_weights(stream, ["a.weight"])) == stream
    with pytest.raises(UsageError, match=r"b\.weight and 1 more are in no file"):
        list(complete_weights(stream, ["a.weight", "c.weight", "b.weight"]))


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
    # As vLLM leaves it.
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
    assert module not in sys.modules
