"""Headers written here equal the library's own, and only complete files are accepted."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats.files.safetensors_header import TORCH_DTYPES, TensorSpec, read_header, shard_header
from sinkprune_plugin.formats.files.shard_reader import read_bytes, read_entries, read_tensor
from sinkprune_plugin.formats.files.shard_writer import (
    ShardWriter,
    shard_names,
    spec_of,
    split_into_shards,
    tensor_bytes,
)

NAMES = st.text(st.sampled_from("abz.AZ09_ü\"\\'漢"), min_size=1, max_size=6)
SPECS = st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), st.lists(st.integers(0, 3), max_size=3))


def random_tensor(dtype, shape):
    count = torch.Size(shape).numel() * TORCH_DTYPES[dtype].itemsize
    data = torch.randint(0, 2 if dtype == "BOOL" else 256, (count,), dtype=torch.uint8)
    return data.view(TORCH_DTYPES[dtype]).view(shape)


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(NAMES, SPECS, max_size=8))
def test_files_are_the_librarys_own(tmp_path_factory, specs):
    folder = tmp_path_factory.mktemp("files")
    tensors = {name: random_tensor(dtype, shape) for name, (dtype, shape) in specs.items()}
    with ShardWriter(folder / "ours", {name: spec_of(tensor, name) for name, tensor in tensors.items()}) as shard:
        for name, tensor in tensors.items():
            shard.write(name, [tensor_bytes(tensor)])
    assert (folder / "ours").read_bytes() == save(tensors, metadata={"format": "pt"})
    entries = read_header(folder / "ours")
    assert entries.keys() == tensors.keys()
    for name, entry in entries.items():
        assert bytes(read_tensor(entry).reshape(-1).view(torch.uint8).tolist()) == bytes(tensor_bytes(tensors[name]))
        assert b"".join(read_bytes(entry)) == bytes(tensor_bytes(tensors[name]))


def test_pieces_of_a_large_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr("sinkprune_plugin.formats.files.shard_reader._PIECE", 7)
    save_file({"a": torch.arange(20), "b": torch.arange(3)}, tmp_path / "f")
    entry = read_header(tmp_path / "f")["a"]
    pieces = [bytes(piece) for piece in read_bytes(entry)]
    assert [len(piece) for piece in pieces] == [7] * 22 + [6]
    assert b"".join(pieces) == bytes(tensor_bytes(torch.arange(20)))


def file_with(tmp_path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "f.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return tmp_path / "f.safetensors"


def one(name="a", dtype="F32", shape=(2,), offsets=(0, 8)):
    return {name: {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        (b"", 0, "no readable safetensors header"),
        (b"{", 0, "no readable safetensors header"),
        (b"\xff{}", 0, "no readable safetensors header"),
        (b"[" * 100_000, 0, "no readable safetensors header"),
        (b"[]", 0, "has a list for a header"),
        (b'{"a":{},"a":{}}', 0, "has two entries 'a'"),
        ({"__metadata__": []}, 0, "isn't a mapping"),
        ({"a": 1}, 0, "a in .* lacks dtype"),
        ({"a": {"dtype": "F32", "shape": []}}, 0, "lacks dtype"),
        ({"a": {"dtype": "F32", "shape": [], "data_offsets": [0]}}, 0, "lacks dtype"),
        (one(dtype="F99"), 8, "unknown dtype 'F99'"),
        (one(dtype=["F32"]), 8, "unknown dtype"),
        (one(shape=[-2]), 8, "aren't sizes"),
        (one(shape=[True, 2]), 8, "aren't sizes"),
        (one(shape=[2.0]), 8, "aren't sizes"),
        (one(shape=[1] * 65), 8, "aren't sizes"),
        (one(shape=[2**62]), 8, "aren't sizes"),
        (one(offsets=["0", 8]), 8, "aren't sizes"),
        (one(shape=[2**61, 2**61]), 8, "which no tensor can have"),
        (one(shape=[2**61, 0, 2**61], offsets=(0, 0)), 0, "which no tensor can have"),
        (one("a" * 513), 8, "'aaa.*…a*' of 513 characters can't be the name of a tensor"),
        (one("1" * 5000), 8, "of 5000 characters can't be the name of a tensor"),
        (one(shape=[3]), 8, "a in .* is F32 of shape .3., which takes 12 bytes, but has 8"),
        (one(dtype="F4", shape=[3], offsets=(0, 1)), 1, "which takes 1 bytes"),
        (one(offsets=(8, 0)), 8, "takes 8 bytes, but has -8"),
        (one(offsets=(4, 12)), 12, "starts at byte .* instead of"),
        (one() | one("b"), 8, "b in .* starts at byte|a in .* starts at byte"),
        (one(), 7, "is truncated: a ends at byte"),
        (one(), 9, "1 bytes after its last tensor"),
        (one("a\nb"), 8, "can't be the name of a tensor"),
        (one("a\ud800"), 8, "can't be the name of a tensor"),
        (one(""), 8, "can't be the name of a tensor"),
    ],
)
def test_a_damaged_header_is_refused_naming_the_file(tmp_path, header, size, message):
    file = file_with(tmp_path, header, bytes(size))
    with pytest.raises(UsageError, match=message) as raised:
        read_header(file)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("data", [b"", b"1234567", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 3) + b"{}"])
def test_a_file_without_a_header_is_refused(tmp_path, data):
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(UsageError, match="no safetensors header within"):
        read_header(tmp_path / "f")


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path):
    save_file({"a": torch.arange(20)}, tmp_path / "f")
    entry = read_header(tmp_path / "f")["a"]
    (tmp_path / "f").write_bytes((tmp_path / "f").read_bytes()[:-8])
    with pytest.raises(UsageError, match="has shrunk while a was read"):
        read_tensor(entry)


def test_a_dtype_that_torch_lacks_can_be_copied_but_not_read(tmp_path):
    file = file_with(tmp_path, one(dtype="F4", shape=(4, 4)), bytes(range(8)))
    entry = read_header(file)["a"]
    assert b"".join(read_bytes(entry)) == bytes(range(8))
    with pytest.raises(UsageError, match=r"a in .* is F4, which torch can't hold"):
        read_tensor(entry)


def test_a_tensor_of_another_size_than_announced(tmp_path):
    with pytest.raises(UsageError, match="a has 4 bytes and had 8 before"), _writer(tmp_path) as shard:
        shard.write("a", [memoryview(bytes(4))])


def test_a_forgotten_tensor_is_a_programming_error(tmp_path):
    with pytest.raises(RuntimeError, match="without"), _writer(tmp_path):
        pass


def _writer(tmp_path):
    return ShardWriter(tmp_path / "f", {"a": TensorSpec("F32", (2,))})


def test_metadata_and_alignment(tmp_path):
    header, offsets = shard_header({"a": TensorSpec("U8", (3,)), "b": TensorSpec("I64", (1,))})
    assert len(header) % 8 == 0
    assert offsets == {"b": len(header), "a": len(header) + 8}
    (tmp_path / "f").write_bytes(header + bytes(11))
    with safe_open(tmp_path / "f", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_are_filled_up_to_the_limit_and_numbered():
    assert split_into_shards([4, 4, 4, 20, 1], 8) == [0, 0, 1, 2, 3]
    assert split_into_shards([20, 1], 8) == [0, 1]
    assert split_into_shards([], 8) == []
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(12)[10] == "model-00011-of-00012.safetensors"


@pytest.fixture
def sharded(tmp_path):
    for number, name in enumerate("ab"):
        save_file({name: torch.zeros(2)}, tmp_path / f"{number}.safetensors")
    return tmp_path, {"a": "0.safetensors", "b": "1.safetensors"}


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_entries_are_read_from_the_files_that_the_index_names(sharded):
    folder, weight_map = sharded
    write_index(folder, weight_map)
    assert {name: entry.file.name for name, entry in read_entries(folder).items()} == weight_map


@pytest.mark.parametrize(
    "name", ["../0.safetensors", "/etc/passwd", "sub/0.safetensors", "0.bin", "a\nb.safetensors", 3]
)
def test_index_that_names_a_file_elsewhere(sharded, name):
    folder, weight_map = sharded
    write_index(folder, weight_map | {"b": name})
    with pytest.raises(UsageError, match=r"isn't a .* file next to it"):
        read_entries(folder)


def test_index_that_names_a_missing_file(sharded):
    folder, weight_map = sharded
    write_index(folder, weight_map)
    (folder / "1.safetensors").unlink()
    with pytest.raises(UsageError, match=r"index.json names 1\.safetensors, which isn't there"):
        read_entries(folder)


def test_index_that_contradicts_the_files(sharded):
    folder, weight_map = sharded
    write_index(folder, weight_map | {"c": "1.safetensors"})
    with pytest.raises(UsageError, match=r"says that 1\.safetensors holds 'c', which it doesn't"):
        read_entries(folder)


def test_one_name_in_two_files(sharded):
    folder, weight_map = sharded
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, folder / "1.safetensors")
    write_index(folder, weight_map)
    with pytest.raises(UsageError, match=r"^a is in .*0\.safetensors and again in .*1\.safetensors; keep one"):
        read_entries(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', "[" * 100_000])
def test_a_broken_index_is_refused_naming_it(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UsageError, match=r"index\.json"):
        read_entries(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"has neither model\.safetensors nor"):
        read_entries(tmp_path)
    with pytest.raises(UsageError, match="isn't a directory"):
        read_entries(tmp_path / "nowhere")
