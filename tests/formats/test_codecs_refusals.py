"""Weights that no layout holds, and damaged parts: refused naming the weight."""

import pytest
import torch
from codec_cases import CODECS, ids

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats.codecs import bitmask, bitmask24, bits


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
    (changed("bitmask", lambda mask: mask | 0x80), "bits set after the last column 19"),
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
