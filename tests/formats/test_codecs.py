"""The two layouts of one weight against their plainest definition: round trips, pieces, devices, memory orders."""

import pytest
import torch
from codec_cases import CODECS, DTYPES, assert_round_trip, bit_patterns, cast, ids, raw
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkprune_plugin.formats.codecs import bitmask, bitmask24, bits


def reference_bitmask(weight):
    """The definition, one element at a time."""
    values, offsets = [], []
    mask = torch.zeros(weight.shape[0], -(-weight.shape[1] // 8), dtype=torch.uint8)
    for row in range(weight.shape[0]):
        offsets.append(len(values))
        for column in range(weight.shape[1]):
            if weight[row, column].float() != 0:
                values.append(bit_patterns(weight)[row, column].item())
                mask[row, column // 8] |= 1 << column % 8
    return values, mask, offsets


# Columns set in a group of four → columns stored, as the last releases of compressed-tensors wrote them.
FILLED = {(): (2, 3), (0,): (0, 2), (1,): (1, 3), (2,): (2, 3), (3,): (2, 3)}


def reference_bitmask24(weight):
    values, mask = [], torch.zeros(weight.shape[0], -(-weight.shape[1] // 8), dtype=torch.uint8)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], 4):
            columns = tuple(column for column in range(4) if weight[row, start + column].float() != 0)
            for column in FILLED.get(columns, columns):
                values.append(bit_patterns(weight)[row, start + column].item())
                mask[row, (start + column) // 8] |= 1 << (start + column) % 8
    return values, mask


@st.composite
def weights(draw, two_of_four=False):
    rows = draw(st.integers(0, 9))
    columns = draw(st.integers(0, 8).map(lambda groups: 4 * groups) if two_of_four else st.integers(0, 35))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    values = torch.randint(-128, 128, (rows, columns), generator=generator)
    weight = values.to(torch.int8) if dtype == torch.int8 else cast(values, dtype)
    if dtype != torch.int8:
        special = torch.rand(rows, columns, generator=generator)
        special_values = torch.tensor([float("nan"), -0.0]).to(dtype)
        bit_patterns(weight)[special < 0.1] = bit_patterns(special_values)[0]
        bit_patterns(weight)[special > 0.9] = bit_patterns(special_values)[1]
    mask = torch.rand(rows, columns, generator=generator) < density
    if two_of_four:
        ranks = torch.rand(rows, columns // 4, 4, generator=generator).argsort(dim=-1).view(rows, columns)
        mask &= ranks < 2
    return bit_patterns(weight).masked_fill(~mask, 0).view(dtype)


@settings(deadline=None, max_examples=150)
@given(weights())
def test_bitmask_equals_the_definition_and_comes_back(weight):
    before = bit_patterns(weight).clone()
    parts = bitmask.compress(weight)
    values, mask, offsets = reference_bitmask(weight)
    assert bit_patterns(parts["compressed"]).tolist() == values
    assert parts["compressed"].dtype == weight.dtype
    assert torch.equal(parts["bitmask"], mask)
    assert parts["row_offsets"].tolist() == offsets
    assert parts["shape"].tolist() == list(weight.shape)
    assert {part: tensor.dtype for part, tensor in parts.items() if part != "compressed"} == {
        "bitmask": torch.uint8,
        "row_offsets": torch.int64,
        "shape": torch.int64,
    }
    kept = {part: tensor.clone() for part, tensor in parts.items()}
    assert_round_trip(weight, bitmask.decompress(parts))
    assert torch.equal(bit_patterns(weight), before)
    assert all(raw(parts[part]) == raw(kept[part]) for part in parts)


@settings(deadline=None, max_examples=150)
@given(weights(two_of_four=True))
def test_bitmask24_equals_the_definition_and_comes_back(weight):
    before = bit_patterns(weight).clone()
    parts = bitmask24.compress(weight)
    values, mask = reference_bitmask24(weight)
    assert parts["compressed"].shape == (weight.shape[0], weight.shape[1] // 2)
    assert bit_patterns(parts["compressed"]).flatten().tolist() == values
    assert torch.equal(parts["bitmask"], mask)
    assert parts["shape"].tolist() == [[size] for size in weight.shape]
    assert_round_trip(weight, bitmask24.decompress(parts))
    assert torch.equal(bit_patterns(weight), before)


@pytest.mark.parametrize("codec", CODECS, ids=ids)
@pytest.mark.parametrize("shape", [(7, 24), (1, 8), (64, 4)])
def test_a_weight_of_several_pieces(codec, shape, monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(shape).bfloat16()
    weight.view(-1, 4)[:, :2] = 0
    whole = codec.compress(weight)
    monkeypatch.setattr(bits, "_PIECE_CPU", 16)
    pieces = codec.compress(weight)
    assert all(raw(whole[part]) == raw(pieces[part]) for part in whole)
    assert torch.equal(codec.decompress(pieces), weight)


@pytest.mark.parametrize("columns", [0, 1, 7, 8, 9, 64, 83])
def test_kernels_for_other_devices(columns):
    torch.manual_seed(0)
    mask = torch.rand(5, columns) < 0.5
    packed = bits.pack(mask)
    assert torch.equal(bits._pack_on_device(mask), packed)
    assert torch.equal(bits._unpack_on_device(packed, columns), mask)
    assert torch.equal(bits.unpack(packed, columns), mask)
    assert bits.bit_counts(packed).tolist() == mask.sum(dim=1).tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("codec", CODECS, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES)
def test_accelerator_gives_the_same_bytes(codec, dtype):
    torch.manual_seed(0)
    weight = cast(torch.randint(-7, 8, (65, 72)), dtype)
    bit_patterns(weight).view(-1, 4)[:, 1:3] = 0
    device = torch.accelerator.current_accelerator()
    there = codec.compress(weight.to(device))
    here = codec.compress(weight)
    assert all(tensor.device.type == device.type for tensor in there.values())
    assert all(raw(there[part].cpu()) == raw(here[part]) for part in here)
    assert raw(codec.decompress(there).cpu()) == raw(codec.decompress(here))


@pytest.mark.parametrize("codec", CODECS, ids=ids)
def test_input_in_any_memory_order(codec):
    torch.manual_seed(0)
    weight = torch.randn(8, 12) * torch.tensor([1, 0, 0, 1] * 3)
    parts = codec.compress(weight)
    for view in (weight.t().contiguous().t(), torch.nn.Parameter(weight), torch.stack([weight, weight])[1]):
        assert all(raw(part) == raw(parts[name]) for name, part in codec.compress(view).items())
    strided = {name: torch.stack([part, part], dim=-1)[..., 0] for name, part in parts.items()}
    assert torch.equal(codec.decompress(strided), weight)
