"""Digests of the weight files: they reveal a change that the formats themselves can't."""

import hashlib
import json

import pytest
import torch
from checkpoint_maker import CONFIG, TARGETS, assert_same, model, unstructured, write_dense
from safetensors.torch import load_file, save_file

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import convert_checkpoint, load_sparse_checkpoint, save_sparse_checkpoint
from sinkprune_plugin.inspection.info import inspect_checkpoint

FORMATS = ["sparse-bitmask", "sparse-24-bitmask"]
KEY = "sinkprune_sha256"


@pytest.fixture(params=FORMATS)
def checkpoint(request, tmp_path):
    source = write_dense(tmp_path / "source", model(), shards=3)
    convert_checkpoint(source, tmp_path / "c", request.param)
    return tmp_path / "c"


def block_of(directory):
    return json.loads((directory / "config.json").read_text()).get("quantization_config", {})


def edit_block(directory, **changes):
    block = block_of(directory) | changes
    block = {key: value for key, value in block.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": block}))


def cancelling_flips(file):
    """Swap a set and an unset bit of one mask row, in a group of four: every count stays what it was."""
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".bitmask"))
    byte = int(tensors[name][0, 0])
    group = next(shift for shift in (0, 4) if byte >> shift & 15 not in (0, 15))
    bits = [byte >> group + bit & 1 for bit in range(4)]
    tensors[name][0, 0] ^= 1 << group + bits.index(0) | 1 << group + bits.index(1)
    save_file(tensors, file, metadata={"format": "pt"})


def all_uses(directory):
    yield lambda: dict(load_sparse_checkpoint(directory))
    yield lambda: inspect_checkpoint(directory)
    yield lambda: convert_checkpoint(directory, directory.parent / "out", "dense", overwrite=True)
    yield lambda: save_sparse_checkpoint(load_sparse_checkpoint(directory), directory.parent / "out", overwrite=True)


def test_each_file_has_one_that_sha256sum_shows(checkpoint):
    files = sorted(checkpoint.glob("*.safetensors"))
    assert len(files) == 3
    assert block_of(checkpoint)[KEY] == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert_same(load_sparse_checkpoint(checkpoint), model())


def test_saved_from_memory(tmp_path):
    save_sparse_checkpoint(model(), tmp_path / "c", config=CONFIG)
    assert block_of(tmp_path / "c")[KEY].keys() == {"model.safetensors"}
    # Written again from its own configuration: no digest of an earlier file stays.
    reader = load_sparse_checkpoint(tmp_path / "c")
    save_sparse_checkpoint(reader, tmp_path / "d", config=reader.config, max_shard_bytes=5000)
    assert "model.safetensors" not in block_of(tmp_path / "d")[KEY]
    assert_same(load_sparse_checkpoint(tmp_path / "d"), model())


def test_not_where_another_reader_would_stumble(checkpoint):
    folder = checkpoint.parent
    convert_checkpoint(checkpoint, folder / "legacy", "auto", layout="legacy")
    assert KEY not in block_of(folder / "legacy")
    convert_checkpoint(checkpoint, folder / "dense", "dense")
    assert block_of(folder / "dense") == {}


def test_two_flipped_bits_that_cancel(checkpoint):
    cancelling_flips(checkpoint / "model-00002-of-00003.safetensors")
    for use in all_uses(checkpoint):
        with pytest.raises(UsageError, match=r"model-00002-of-00003\.safetensors isn't the file that was written: its"):
            use()
    # Without digests it can't be detected.
    edit_block(checkpoint, **{KEY: ...})
    for use in all_uses(checkpoint):
        use()
    assert not torch.equal(load_sparse_checkpoint(checkpoint)[TARGETS[2]], model()[TARGETS[2]])


@pytest.mark.parametrize("index", [-1, -500, -2000])
def test_one_flipped_bit_anywhere(checkpoint, index):
    file = sorted(checkpoint.glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[index] ^= 1
    file.write_bytes(data)
    with pytest.raises(UsageError, match="model-00001-of-00003"):
        dict(load_sparse_checkpoint(checkpoint))


def test_a_tensor_that_contradicts_itself_is_named(checkpoint):
    file = checkpoint / "model-00003-of-00003.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".bitmask"))
    tensors[name][0, 0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    dense = name.replace(".bitmask", ".weight")
    for use in all_uses(checkpoint):
        with pytest.raises(UsageError, match=rf"{dense} \(model-00003-of-00003\.safetensors\): "):
            use()


def test_only_the_files_that_are_read_are_compared(checkpoint):
    cancelling_flips(checkpoint / "model-00002-of-00003.safetensors")
    reader = load_sparse_checkpoint(checkpoint)
    good = next(name for name in reader if reader.shard(name) == 0)
    assert torch.equal(reader[good], model()[good])


def test_each_file_is_compared_once(checkpoint, monkeypatch):
    from sinkprune_plugin.formats.files import digests

    compared = []
    original = digests.file_digest
    monkeypatch.setattr(digests, "file_digest", lambda file: compared.append(file.name) or original(file))
    reader = load_sparse_checkpoint(checkpoint)
    assert compared == []
    for name in reader:
        reader[name]
        list(reader.chunks(name))
    assert sorted(compared) == sorted(file.name for file in reader.files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model-00002-of-00003.safetensors": ...}, "model-00002-of-00003.safetensors has no digest in config.json"),
        ({"extra.safetensors": "0" * 64}, "extra.safetensors has a digest but isn't one of the weight files"),
        ({"model-00002-of-00003.safetensors": "0" * 64}, "isn't the file that was written"),
        ({"model-00002-of-00003.safetensors": ""}, "isn't the file that was written"),
        ({"model-00002-of-00003.safetensors": 7}, "isn't a mapping from file names to digests"),
    ],
)
def test_digests_that_do_not_fit(checkpoint, change, message):
    digests = block_of(checkpoint)[KEY] | change
    edit_block(checkpoint, **{KEY: {name: value for name, value in digests.items() if value is not ...}})
    for use in all_uses(checkpoint):
        with pytest.raises(UsageError, match=message):
            use()


@pytest.mark.parametrize("value", [[], 3, "x", True])
def test_digests_of_the_wrong_type(checkpoint, value):
    edit_block(checkpoint, **{KEY: value})
    for use in all_uses(checkpoint):
        with pytest.raises(UsageError, match="isn't a mapping from file names to digests"):
            use()


def test_quantized_checkpoints_have_them_too(tmp_path):
    """Next to the quantization's own keys, and removed with the sparsity."""
    quantization = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"a": 1}}
    tensors = {"l.0.q.weight": unstructured(16, 32, dtype=torch.int8), "l.0.q.weight_scale": torch.ones(16, 1)}
    config = CONFIG | {"quantization_config": quantization}
    targets = ["l.0.q.weight"]
    save_sparse_checkpoint(tensors, tmp_path / "c", config=config, format="sparse-bitmask", targets=targets)
    assert block_of(tmp_path / "c")[KEY].keys() == {"model.safetensors"}
    convert_checkpoint(tmp_path / "c", tmp_path / "d", "dense")
    assert block_of(tmp_path / "d") == quantization
