"""The two layouts of one weight: golden bytes, and what the old writer left behind."""

import pytest
import torch
from checkpoint_files import LEGACY
from codec_cases import CODECS, assert_round_trip, raw
from safetensors.torch import load_file, save

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats.codecs import bitmask, bitmask24


def test_bitmask_golden_vector():
    """Written by compressed-tensors 0.9.4 and 0.14.0."""
    weight = torch.tensor(
        [[0, 1, 0, 2, 0, 0, 3, 0, 4, 0], [0] * 10, [5, 0, 0, 0, 0, 0, 0, -6, 0, -0.0]], dtype=torch.bfloat16
    )
    parts = bitmask.compress(weight)
    assert parts["shape"].tolist() == [3, 10]
    assert parts["compressed"].tolist() == [1, 2, 3, 4, 5, -6]
    assert raw(parts["compressed"]) == bytes.fromhex("803f 0040 4040 8040 a040 c0c0")
    assert parts["bitmask"].tolist() == [[74, 1], [0, 0], [129, 0]]
    assert parts["row_offsets"].tolist() == [0, 4, 4]


def test_bitmask24_golden_vector():
    """Written by compressed-tensors 0.9.4 and 0.14.0; their third row wasn't 2:4 and is left out."""
    weight = torch.tensor([[0, 1, 0, 2, -3, 0, 0, 4], [0, 0, 0, 0, 0, 0, 0, 5]], dtype=torch.bfloat16)
    parts = bitmask24.compress(weight)
    data = save({f"w.{part}": tensor for part, tensor in parts.items()})
    assert parts["shape"].tolist() == [[2], [8]]
    assert parts["compressed"].tolist() == [[1, 2, -3, 4], [0, 0, 0, 5]]
    assert parts["bitmask"].tolist() == [[154], [204]]
    assert data[8 + int.from_bytes(data[:8], "little") :] == bytes.fromhex(
        "0200000000000000 0800000000000000 803f 0040 40c0 8040 0000 0000 0000 a040 9a cc"
    )


def test_bitmask24_reads_what_the_old_writer_made_of_an_invalid_row():
    parts = {
        "shape": torch.tensor([[3], [8]]),
        "compressed": torch.tensor([[1, 2, -3, 4], [0, 0, 0, 5], [3, 4, -4, -3]], dtype=torch.bfloat16),
        "bitmask": torch.tensor([[154], [204], [60]], dtype=torch.uint8),
    }
    assert bitmask24.decompress(parts)[2].tolist() == [0, 0, 3, 4, -4, -3, 0, 0]
    assert torch.equal(bitmask24.decompress(parts | {"shape": torch.tensor([3, 8])}), bitmask24.decompress(parts))


def test_bitmask24_golden_vector_in_fp8():
    weight = torch.tensor([[0, 1, 0, -2, -3, 0, 0, -0.0]]).to(torch.float8_e4m3fn)
    values = torch.tensor([[56, 192, 196, 0]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    parts = {"shape": torch.tensor([[1], [8]]), "compressed": values, "bitmask": torch.tensor([[58]]).byte()}
    assert_round_trip(weight, bitmask24.decompress(parts))
    # In fp8 alone, the old writer's choice of zeros depended on their signs; ours doesn't.
    parts = bitmask24.compress(weight)
    assert list(raw(parts["compressed"])) == [56, 192, 196, 0]
    assert parts["bitmask"].tolist() == [[90]]


def test_int8_keeps_its_lowest_value():
    """The old 2:4 writer ranked by absolute value, which overflows, and lost it."""
    weight = torch.tensor([[-128, 0, 0, 2]], dtype=torch.int8)
    for codec in CODECS:
        assert torch.equal(codec.decompress(codec.compress(weight)), weight)


@pytest.mark.parametrize("stored", [0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100])
def test_bitmask24_reads_any_choice_of_filled_zeros(stored):
    parts = {
        "shape": torch.tensor([[1], [4]]),
        "compressed": torch.zeros(1, 2),
        "bitmask": torch.tensor([[stored]], dtype=torch.uint8),
    }
    assert bitmask24.decompress(parts).tolist() == [[0, 0, 0, 0]]


def test_bitmask24_reads_groups_that_run_over_the_end_of_a_row():
    """The old writer grouped the flattened weight."""
    parts = {
        "shape": torch.tensor([[2], [6]]),
        "compressed": torch.tensor([[1.0, 2, 3], [4, 5, 6]]),
        "bitmask": torch.tensor([[0b100011], [0b110001]], dtype=torch.uint8),
    }
    assert bitmask24.decompress(parts).tolist() == [[1, 2, 0, 0, 0, 3], [4, 0, 0, 0, 5, 6]]
    parts["bitmask"][0, 0] = 0b000111
    with pytest.raises(UsageError, match="2 groups of 4 in bitmask don't have exactly 2 bits"):
        bitmask24.decompress(parts)


@pytest.mark.parametrize("shape", [(11,), (2, 3, 11), (2, 2, 2, 9)])
def test_bitmask_reads_tensors_of_other_ranks(shape):
    """Before 0.9 every tensor was compressed; beyond two axes its row_offsets mean nothing."""
    torch.manual_seed(0)
    weight = torch.randn(shape) * (torch.rand(shape) < 0.5)
    parts = bitmask.compress(weight.view(-1, shape[-1]))
    parts["shape"] = torch.tensor(shape)
    parts["bitmask"] = parts["bitmask"].view(*shape[:-1], -1)
    parts["row_offsets"] = parts["row_offsets"].view(shape[:-1]) if len(shape) < 3 else torch.full(shape[:-1], 77)
    assert torch.equal(bitmask.decompress(parts), weight)


@pytest.mark.parametrize("name", ["sparse-24-bitmask", "sparse-bitmask", "sparse-bitmask-fp16"])
def test_same_bytes_as_the_old_writer(name):
    stored = load_file(LEGACY / name / "model.safetensors")
    codec = bitmask24 if name == "sparse-24-bitmask" else bitmask
    compressed = 0
    for dense_name, weight in load_file(LEGACY / name / "dense" / "model.safetensors").items():
        module = dense_name.removesuffix(".weight")
        if dense_name in stored:
            continue
        parts = codec.compress(weight)
        assert parts.keys() == {key.rpartition(".")[2] for key in stored if key.rpartition(".")[0] == module}
        for part, tensor in parts.items():
            assert tensor.dtype == stored[f"{module}.{part}"].dtype
            assert torch.equal(tensor, stored[f"{module}.{part}"])
        assert torch.equal(codec.decompress(parts), weight)
        compressed += 1
    assert compressed == 6
