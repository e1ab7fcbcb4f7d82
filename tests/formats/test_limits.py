"""Claims made by a few bytes: rows without columns, numbers and names of any length. Harmless, or refused in a line."""

import json
import struct

import pytest
import torch
from checkpoint_maker import CONFIG, model, write_dense
from limited_memory import limited_memory
from safetensors.torch import save_file

from sinkprune_plugin.errors import UsageError, short
from sinkprune_plugin.formats import convert_checkpoint, load_sparse_checkpoint
from sinkprune_plugin.formats.codecs import bitmask, bitmask24
from sinkprune_plugin.inspection.info import inspect_checkpoint

MANY = 1 << 29


@pytest.fixture(autouse=True)
def _memory():
    with limited_memory():
        yield


def write_header(file, tensors, data=b""):
    """A safetensors file with an arbitrary header.

    :param tensors: name → (dtype, shape, number of bytes)
    """
    header, end = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data.ljust(end, b"\0"))


def write_sparse(folder, sparse_format, tensors, data):
    folder.mkdir(exist_ok=True)
    write_header(folder / "model.safetensors", tensors, data)
    block = {"quant_method": "compressed-tensors-sparse", "sparsity_config": {"format": sparse_format}}
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": block}))
    return folder


def no_columns(folder, sparse_format, rows):
    tensors = {
        "m.layers.0.q.shape": ("I64", [2], 16),
        "m.layers.0.q.compressed": ("BF16", [0] if sparse_format == "sparse-bitmask" else [rows, 0], 0),
        "m.layers.0.q.bitmask": ("U8", [rows, 0], 0),
    }
    if sparse_format == "sparse-bitmask":
        tensors["m.layers.0.q.row_offsets"] = ("I64", [0], 0)
    return write_sparse(folder, sparse_format, tensors, struct.pack("<2q", rows, 0))


def each_use(folder):
    yield lambda: dict(load_sparse_checkpoint(folder))
    yield lambda: inspect_checkpoint(folder)
    for to in ("dense", "auto"):
        yield lambda to=to: convert_checkpoint(folder, folder.parent / "out", to, overwrite=True)


@pytest.mark.parametrize("rows", [MANY, 1 << 40, 1 << 61])
def test_rows_without_columns_of_2_of_4_take_no_memory(tmp_path, rows):
    """A file of some 300 bytes, and nothing in it contradicts anything else."""
    folder = no_columns(tmp_path / "c", "sparse-24-bitmask", rows)
    assert (folder / "model.safetensors").stat().st_size < 400
    for use in each_use(folder):
        use()
    assert load_sparse_checkpoint(folder)["m.layers.0.q.weight"].shape == (rows, 0)


@pytest.mark.parametrize("rows", [MANY, 1 << 40, 1 << 61])
def test_rows_of_a_bitmask_are_as_many_as_their_offsets(tmp_path, rows):
    folder = no_columns(tmp_path / "c", "sparse-bitmask", rows)
    for use in each_use(folder):
        with pytest.raises(UsageError, match=rf"row_offsets has shape \[0\], the weight has {rows} rows"):
            use()


@pytest.mark.parametrize("shape", [[MANY, 0], [0, MANY], [1 << 61, 0], [0, 1 << 61], [1 << 30, 0, 1 << 30]])
@pytest.mark.parametrize("dtype", ["BF16", "I8", "F64", "F8_E5M2"])
def test_dense_weights_without_elements_take_no_memory(tmp_path, shape, dtype):
    folder = write_dense(tmp_path / "c", {})
    write_header(folder / "model.safetensors", {"m.layers.0.q.weight": (dtype, shape, 0)})
    for use in each_use(folder):
        use()


@pytest.mark.parametrize("codec", [bitmask, bitmask24])
def test_codecs_on_rows_without_columns(codec):
    parts = {
        "shape": torch.tensor([MANY, 0]),
        "compressed": torch.empty((MANY, 0) if codec is bitmask24 else 0, dtype=torch.bfloat16),
        "bitmask": torch.empty(MANY, 0, dtype=torch.uint8),
        "row_offsets": torch.zeros(1, dtype=torch.int64),
    }
    if codec is bitmask24:
        assert codec.decompress(parts).shape == (MANY, 0)
        assert codec.compress(torch.empty(MANY, 0, dtype=torch.bfloat16))["compressed"].shape == (MANY, 0)
    else:
        with pytest.raises(UsageError, match="row_offsets has shape"):
            codec.decompress(parts)
    for rows, columns in ((0, 0), (3, 0), (0, 8)):
        weight = torch.zeros(rows, columns)
        assert codec.decompress(codec.compress(weight)).shape == weight.shape


@pytest.mark.parametrize("name", ["1" * 5000, "layers." + "9" * 5000 + ".q.weight", "a" * 100_000, "ü" * 600])
@pytest.mark.parametrize("where", ["tensor", "index", "target", "format", "method", "digest", "asked for"])
def test_long_names_make_no_long_messages(tmp_path, name, where):
    folder = write_dense(tmp_path / "c", model(), shards=2)
    sparsity = {"format": "sparse-bitmask"}
    block = {"quant_method": "compressed-tensors-sparse", "sinkprune_version": "1", "sparsity_config": sparsity}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    targets = None
    if where == "tensor":
        write_header(folder / "model-00001-of-00002.safetensors", {name: ("F32", [2], 8)})
    elif where == "index":
        index["weight_map"][name] = "model-00001-of-00002.safetensors"
    elif where == "target":
        sparsity["targets"] = [name]
    elif where == "format":
        sparsity["format"] = name
    elif where == "method":
        block = {"quant_method": name, "sparsity_config": sparsity}
    elif where == "digest":
        block["sinkprune_sha256"] = {name: name}
    else:
        targets = [name]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": block}))
    with pytest.raises(UsageError) as raised:
        convert_checkpoint(folder, tmp_path / "out", "sparse-bitmask", targets=targets)
    assert len(str(raised.value)) < 1000
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("length", [200, 255, 256, 300, 5000])
def test_long_file_names_in_the_index(tmp_path, length):
    folder = write_dense(tmp_path / "c", model(), shards=2)
    index = {"weight_map": {"a": "x" * (length - len(".safetensors")) + ".safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    message = "which isn't there" if length <= 255 else "isn't a .* file next to it"
    for use in each_use(folder):
        with pytest.raises(UsageError, match=message) as raised:
            use()
        assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000, "x/" * 5000])
def test_a_path_that_no_file_system_takes(tmp_path, name):
    for use in each_use(tmp_path / name):
        with pytest.raises(UsageError, match=r"can't be read|isn't a directory|no config\.json"):
            use()


def test_a_json_file_of_gigabytes_is_not_read(tmp_path):
    folder = write_dense(tmp_path / "c", model())
    with (folder / "config.json").open("r+b") as stream:
        stream.truncate(1 << 33)
    for use in each_use(folder):
        with pytest.raises(UsageError, match=r"config\.json has over 100 MB of JSON"):
            use()


def test_text_from_files_is_shortened_and_made_printable():
    assert short("a" * 120) == "a" * 120
    assert short("a" * 60 + "b" * 61) == "a" * 60 + "b" * 19 + "…" + "b" * 40
    assert short("a\nb\x1b[2J\u202e") == "a?b?[2J?"
    assert short(["x"] * 1000, 10) == "['x', …x']"


def test_blocks_are_sorted_by_numbers_of_any_size(tmp_path):
    names = [f"m.layers.{number}.q.weight" for number in ("9" * 400, "10", "9")]
    save_file({name: torch.ones(2, 4) for name in names}, write_dense(tmp_path, {}) / "model.safetensors")
    assert [*inspect_checkpoint(tmp_path).blocks] == [f"m.layers.{number}" for number in ("9", "10", "9" * 400)]
