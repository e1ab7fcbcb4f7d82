"""The two layouts of one weight: golden bytes, the plainest reference, round trips, refusals."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import bitmask, bitmask24, bits

LEGACY = Path(__file__).parent / "fixtures" / "legacy_checkpoints"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
CODECS = [bitmask, bitmask24]
ids = [codec.__name__.rpartition(".")[2] for codec in CODECS]


def raw(tensor):
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def bit_patterns(tensor):
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


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


def cast(values, dtype):
    """Small integers exactly, as any of the dtypes."""
    return values.to(dtype)


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


def assert_round_trip(weight, rebuilt):
    """Bit by bit, but for the sign of zeros."""
    assert rebuilt.dtype == weight.dtype
    assert rebuilt.shape == weight.shape
    zero = weight.float() == 0
    assert torch.equal(bit_patterns(rebuilt)[~zero], bit_patterns(weight)[~zero])
    assert bool((rebuilt.float()[zero] == 0).all())


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


@pytest.mark.parametrize("codec", CODECS, ids=ids)
def test_input_in_any_memory_order(codec):
    torch.manual_seed(0)
    weight = torch.randn(8, 12) * torch.tensor([1, 0, 0, 1] * 3)
    parts = codec.compress(weight)
    for view in (weight.t().contiguous().t(), torch.nn.Parameter(weight), torch.stack([weight, weight])[1]):
        assert all(raw(part) == raw(parts[name]) for name, part in codec.compress(view).items())
    strided = {name: torch.stack([part, part], dim=-1)[..., 0] for name, part in parts.items()}
    assert torch.equal(codec.decompress(strided), weight)


@pytest.mark.parametrize("codec", CODECS, ids=ids)
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(8), "q has 1 dimensions, a sparse weight needs 2"),
        (torch.zeros(2, 2, 4), "q has 3 dimensions"),
        (torch.zeros(2, 4, dtype=torch.float64), "q is float64, sparse formats hold float32, bfloat16"),
        (torch.zeros(2, 4, dtype=torch.int32), "q is int32"),
        (torch.zeros(2, 4).to(torch.float8_e5m2), "q is float8_e5m2"),
        (torch.zeros(2, 4, device="meta"), "q is on the meta device"),
        (torch.zeros(2, 4).to_sparse(), "q is a torch.sparse_coo tensor"),
    ],
)
def test_weights_that_no_format_holds(codec, weight, message):
    with pytest.raises(UsageError, match=message):
        codec.compress(weight, name="q")


def test_weight_that_is_not_2_of_4():
    weight = torch.tensor([[1, 2, 3, 4, -4, -3, -2, -1], [0, 1, 0, 2, 1, 1, 1, 0]])
    with pytest.raises(
        UsageError, match=r"layers\.0\.q isn't 2:4: 3 of its 4 groups of 4 have more than 2 non-zeros; use"
    ):
        bitmask24.compress(weight.half(), name="layers.0.q")
    with pytest.raises(UsageError, match="q has 6 columns, sparse-24-bitmask needs a multiple of 4"):
        bitmask24.compress(torch.zeros(2, 6), name="q")


def good_parts(codec):
    torch.manual_seed(0)
    weight = (torch.rand(6, 20) + 1).bfloat16()
    weight.view(-1, 4)[:, ::2] = 0
    return codec.compress(weight)


def changed(part, change):
    def apply(parts):
        parts[part] = change(parts[part])

    return apply


COMMON_DAMAGE = [
    (lambda parts: parts.pop("bitmask"), "part bitmask is missing"),
    (changed("bitmask", lambda mask: mask[:, :2]), r"needs a bitmask of \[6, 3\], but it is \[6, 2\]"),
    (changed("bitmask", lambda mask: mask.flatten()), "needs a bitmask of"),
    (changed("bitmask", lambda mask: mask.short()), "bitmask is int16, it must be uint8"),
    (changed("bitmask", lambda mask: mask | 0x80), "bits set behind the last column 19"),
    (changed("shape", lambda shape: shape.int()), "shape is int32, it must be int64"),
    (changed("shape", lambda shape: shape[:0]), "shape has 0 entries"),
    (changed("shape", lambda shape: torch.arange(100)), "shape has 100 entries"),
    (changed("shape", lambda shape: -shape), r"shape says \[-6, -20\]"),
    (changed("shape", lambda shape: shape + 2**61), "which no tensor can have"),
    (changed("shape", lambda shape: shape * 10**6), "needs a bitmask of"),
    (changed("compressed", lambda values: values.double()), "compressed is float64"),
    (changed("compressed", lambda values: values.to("meta")), "compressed is on the meta device"),
]


@pytest.mark.parametrize(("damage", "message"), COMMON_DAMAGE)
@pytest.mark.parametrize("codec", CODECS, ids=ids)
def test_damaged_parts_are_refused_naming_the_weight(codec, damage, message):
    parts = good_parts(codec)
    damage(parts)
    with pytest.raises(UsageError, match=message) as raised:
        codec.decompress(parts, name="layers.0.q.weight")
    assert str(raised.value).startswith("layers.0.q.weight")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            changed("compressed", lambda values: values[:-1]),
            r"60 bits set, but compressed holds values of shape \[59\]",
        ),
        (changed("compressed", lambda values: values.view(6, 10)), r"values of shape \[6, 10\]"),
        (changed("bitmask", lambda mask: mask ^ 1), "bits set, but compressed"),
        (changed("row_offsets", lambda offsets: offsets + 1), r"row_offsets\[0\] is 1, but 0 bits are set above"),
        (changed("row_offsets", lambda offsets: offsets.roll(-1)), r"row_offsets\[0\] is 10"),
        (changed("row_offsets", lambda offsets: offsets.flip(0)), "row_offsets"),
        (changed("row_offsets", lambda offsets: offsets[1:]), "row_offsets has shape"),
        (lambda parts: parts.pop("row_offsets"), "part row_offsets is missing"),
    ],
)
def test_damaged_bitmask(damage, message):
    parts = good_parts(bitmask)
    damage(parts)
    with pytest.raises(UsageError, match=message):
        bitmask.decompress(parts)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (changed("compressed", lambda values: values[:, 1:]), "instead of half as many columns"),
        (changed("compressed", lambda values: values.flatten()), "instead of half as many columns"),
        (changed("bitmask", lambda mask: mask ^ 1), "don't have exactly 2 bits set"),
        # As many bits as before, in the wrong groups.
        (changed("bitmask", lambda mask: mask.index_fill(0, torch.tensor([0]), 0b1110)), "5 groups of 4"),
        (lambda parts: parts.update(shape=torch.tensor([[6], [21]]), bitmask=torch.zeros(6, 3).byte()), "half as many"),
        (lambda parts: parts.update(shape=torch.tensor([1, 6, 20])), "has 2 dimensions"),
    ],
)
def test_damaged_bitmask24(damage, message):
    parts = good_parts(bitmask24)
    damage(parts)
    with pytest.raises(UsageError, match=message):
        bitmask24.decompress(parts)


@pytest.mark.parametrize("codec", CODECS, ids=ids)
def test_a_lie_about_the_shape_allocates_nothing(codec, monkeypatch):
    parts = good_parts(codec)
    parts["shape"] = torch.tensor([2**40, 2**20])
    monkeypatch.setattr(bits, "place", lambda *_: pytest.fail("allocated"))
    with pytest.raises(UsageError, match="needs a bitmask of"):
        codec.decompress(parts)
