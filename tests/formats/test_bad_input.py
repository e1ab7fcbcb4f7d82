"""Damaged checkpoints and full disks: one line that names file and tensor, and nothing left behind."""

import errno
import json
import os
from types import SimpleNamespace

import pytest
import torch
from checkpoint_maker import CONFIG, TARGETS, assert_same, model, two_of_four, unstructured, write_dense
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import convert_checkpoint, load_sparse_checkpoint, save_sparse_checkpoint

FORMATS = ["sparse-bitmask", "sparse-24-bitmask"]
FIRST = TARGETS[0].removesuffix(".weight")


@pytest.fixture(params=FORMATS)
def checkpoint(request, tmp_path):
    save_sparse_checkpoint(model(), tmp_path / "c", format=request.param, config=CONFIG)
    return tmp_path / "c"


def edit_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")


def edit_config(directory, change):
    config = json.loads((directory / "config.json").read_text())
    change(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


def read_all(directory):
    return dict(load_sparse_checkpoint(directory))


def refused(directory, message):
    with pytest.raises(UsageError, match=message) as raised:
        read_all(directory)
    text = str(raised.value)
    assert "\n" not in text
    # The same when converting, and no output appears.
    with pytest.raises(UsageError) as converting:
        convert_checkpoint(directory, directory.parent / "out", "dense")
    assert str(converting.value) == text
    assert list(directory.parent.iterdir()) == [directory]
    return text


def flip(tensor, index, bits=1):
    tensor.view(-1).view(torch.uint8)[index] ^= bits


@pytest.mark.parametrize("part", ["compressed", "bitmask", "shape"])
def test_a_missing_part_is_named(checkpoint, part):
    edit_tensors(checkpoint, lambda tensors: tensors.pop(f"{FIRST}.{part}"))
    refused(
        checkpoint, f"^{TARGETS[0]}: .* is in .*model.safetensors, but {FIRST}.{part}, which sparse-.* is in no file"
    )


def test_a_flipped_bit_of_the_mask_is_noticed(checkpoint):
    edit_tensors(checkpoint, lambda tensors: flip(tensors[f"{FIRST}.bitmask"], 5))
    refused(checkpoint, rf"^{TARGETS[0]} \(model\.safetensors\): .* bits? set")


def test_values_that_are_cut_off_are_noticed(checkpoint):
    def cut(tensors):
        tensors[f"{FIRST}.compressed"] = tensors[f"{FIRST}.compressed"][:-1]

    edit_tensors(checkpoint, cut)
    refused(checkpoint, rf"^{TARGETS[0]} \(model\.safetensors\): .* compressed")


@pytest.mark.parametrize("offsets", [[0] * 32, list(range(32, 0, -1)), [1] * 32])
def test_wrong_row_offsets(tmp_path, offsets):
    save_sparse_checkpoint(model(), tmp_path / "c", format="sparse-bitmask", config=CONFIG)
    edit_tensors(tmp_path / "c", lambda tensors: tensors.update({f"{FIRST}.row_offsets": torch.tensor(offsets)}))
    refused(tmp_path / "c", rf"^{TARGETS[0]} \(model\.safetensors\): row_offsets\[\d\] is")


@pytest.mark.parametrize("sizes", [[2**40, 2**20], [-32, 48], [48, 32], [0, 0], [32], [32, 47], [2**62, 2**62]])
def test_a_lie_about_the_shape(checkpoint, sizes, monkeypatch):
    monkeypatch.setattr("sinkprune_plugin.formats.codecs.bits.place", lambda *_: pytest.fail("allocated"))

    def lie(tensors):
        tensors[f"{FIRST}.shape"] = torch.tensor(sizes)

    edit_tensors(checkpoint, lie)
    with pytest.raises(UsageError, match=rf"^{TARGETS[0]} \(model\.safetensors\): "):
        load_sparse_checkpoint(checkpoint)[TARGETS[0]]


def test_a_shape_that_contradicts_the_header_is_refused_before_a_weight_is_asked_for(checkpoint):
    edit_tensors(checkpoint, lambda tensors: tensors.update({f"{FIRST}.shape": torch.tensor([48, 32])}))
    with pytest.raises(UsageError, match=rf"^{TARGETS[0]} .*shape says \[48, 32\].*bitmask of \[32, 6\]"):
        load_sparse_checkpoint(checkpoint)


def test_a_huge_shape_part_is_not_read(checkpoint):
    edit_tensors(checkpoint, lambda tensors: tensors.update({f"{FIRST}.shape": torch.zeros(1000).long()}))
    refused(checkpoint, "shape is I64 of 1000 elements")


def test_dtype_that_no_format_holds(checkpoint):
    edit_tensors(
        checkpoint, lambda tensors: tensors.update({f"{FIRST}.compressed": tensors[f"{FIRST}.compressed"].double()})
    )
    refused(checkpoint, "compressed is F64, which no sparse format holds")


def test_dense_and_sparse_of_one_name(checkpoint):
    edit_tensors(checkpoint, lambda tensors: tensors.update({TARGETS[0]: torch.zeros(2)}))
    refused(checkpoint, f"^{TARGETS[0]} is stored twice, dense in .*safetensors and sparse in .*safetensors")


def test_config_of_the_wrong_format(tmp_path):
    save_sparse_checkpoint(model(), tmp_path / "c", format="sparse-bitmask", config=CONFIG)
    edit_config(tmp_path / "c", lambda config: config["sparsity_config"].update(format="sparse-24-bitmask"))
    refused(tmp_path / "c", "row_offsets in .* isn't a part of sparse-24-bitmask: config.json names the wrong format")


@pytest.mark.parametrize("damage", ["no config", "no sparsity", "dense"])
def test_sparse_weights_without_a_sparsity_config(checkpoint, damage):
    """Read as a dense checkpoint, it would be a model without these weights."""
    if damage == "no config":
        (checkpoint / "config.json").unlink()
    elif damage == "no sparsity":
        edit_config(checkpoint, lambda config: (config.clear(), config.update(quant_method="compressed-tensors")))
    else:
        edit_config(checkpoint, lambda config: config["sparsity_config"].update(format="dense"))
    refused(checkpoint, "is part of a sparse weight, but config.json names no sparse format; put its")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 10**5, '{"quantization_config": 3}', "\udcff"])
def test_a_broken_config_is_refused_naming_it(checkpoint, text):
    (checkpoint / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(checkpoint, r"config\.json")


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1000, -1])
def test_a_truncated_weight_file_is_refused_naming_it(checkpoint, length):
    file = checkpoint / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:length])
    refused(checkpoint, r"model\.safetensors")


def test_a_directory_in_place_of_the_weight_file_is_refused(checkpoint, monkeypatch):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").mkdir()
    refused(checkpoint, "has neither model.safetensors nor")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """For each format the files of a small checkpoint in two shards, as few bytes as possible."""
    files = {}
    torch.manual_seed(0)
    for sparse_format in FORMATS:
        weight = two_of_four(4, 12) if sparse_format == "sparse-24-bitmask" else unstructured(4, 11)
        tensors = {"l.0.a.weight": weight, "l.0.b.weight": weight + 0, "l.0.norm": torch.ones(3)}
        folder = tmp_path_factory.mktemp("small")
        save_sparse_checkpoint(
            tensors,
            folder / "c",
            format=sparse_format,
            targets=["l.0.a.weight", "l.0.b.weight"],
            config={"x": 1},
            max_shard_bytes=100,
        )
        files[sparse_format] = {path.name: path.read_bytes() for path in (folder / "c").iterdir()}
        assert len(files[sparse_format]) >= 4
    return files


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_damage_is_refused_or_harmless(small, tmp_path, data):
    """No input of any kind gives another exception than UsageError."""
    files = dict(small[data.draw(st.sampled_from(FORMATS))])
    name = data.draw(st.sampled_from(sorted(files)))
    content = bytearray(files[name])
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["flip", "set", "cut", "insert", "drop"]))
        place = data.draw(st.integers(0, max(len(content) - 1, 0)))
        if kind == "cut":
            del content[place:]
        elif kind == "insert":
            content[place:place] = data.draw(st.binary(min_size=1, max_size=9))
        elif kind == "drop":
            del content[place : place + data.draw(st.integers(1, 9))]
        elif content:
            content[place] = data.draw(st.integers(0, 255)) if kind == "set" else content[place] ^ 1 << place % 8
    files[name] = bytes(content)
    for old in tmp_path.iterdir():
        old.unlink()
    for file, text in files.items():
        (tmp_path / file).write_bytes(text)
    try:
        tensors = read_all(tmp_path)
    except UsageError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either outcome is right
    else:
        for tensor_name, tensor in tensors.items():
            assert isinstance(tensor_name, str)
            assert tensor.nbytes < 1000


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=5,
    ),
    st.sampled_from(["quantization_config", "compression_config", "sparsity_config", "format", "targets", "ignore"]),
)
def test_random_configuration(small, tmp_path, value, key):
    for file, text in small["sparse-bitmask"].items():
        (tmp_path / file).write_bytes(text)

    def put(level):
        nested = {name: put(inner) if isinstance(inner, dict) else inner for name, inner in level.items()}
        return nested | ({key: value} if key in nested else {})

    config = put(json.loads((tmp_path / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    try:
        assert len(read_all(tmp_path)) == 3
    except UsageError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize("written", [0, 1000, 8000])
@pytest.mark.parametrize("form", ["save", "spool", "convert"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, written, form):
    source = write_dense(tmp_path / "source", model(), shards=2)
    room = [written]
    pwrite = os.pwrite

    def limited(descriptor, data, offset):
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = pwrite(descriptor, data[: room[0]], offset)
        room[0] -= count
        return count

    monkeypatch.setattr(os, "pwrite", limited)
    write = {
        "save": lambda: save_sparse_checkpoint(model(), tmp_path / "out"),
        "spool": lambda: save_sparse_checkpoint(iter(model().items()), tmp_path / "out"),
        "convert": lambda: convert_checkpoint(source, tmp_path / "out", "auto"),
    }[form]
    with pytest.raises(UsageError, match=r"tensors can't be written: No space left on device; "):
        write()
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("spooled", [False, True])
def test_a_place_where_nothing_can_be_written(tmp_path, spooled):
    (tmp_path / "file").write_text("")
    tensors = iter(model().items()) if spooled else model()
    with pytest.raises(UsageError, match=r"out lies under \S+/file, which isn't a directory; choose another place"):
        save_sparse_checkpoint(tensors, tmp_path / "file" / "out")


def test_disk_too_full_is_known_beforehand(tmp_path, monkeypatch):
    from sinkprune_plugin import outputs

    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UsageError, match=r"the disk has 0\.00 GB free"):
        save_sparse_checkpoint(model(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_failed_conversion_leaves_an_old_output_alone(checkpoint, tmp_path):
    save_sparse_checkpoint({"a": torch.ones(2)}, tmp_path / "out", config={"old": 1})
    edit_tensors(checkpoint, lambda tensors: flip(tensors[f"{FIRST}.bitmask"], 5))
    with pytest.raises(UsageError):
        convert_checkpoint(checkpoint, tmp_path / "out", "dense", overwrite=True)
    assert_same(load_sparse_checkpoint(tmp_path / "out"), {"a": torch.ones(2)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "out"]


def test_a_source_that_changes_meanwhile(tmp_path):
    class Changing(dict):
        reads = 0

        def __getitem__(self, name):
            Changing.reads += 1
            return unstructured(16, 64, 0.5 if Changing.reads < 3 else 0.9)

    with pytest.raises(UsageError, match="it changed meanwhile"):
        save_sparse_checkpoint(Changing({"l.0.weight": 0}), tmp_path / "out", format="sparse-bitmask")
    assert not list(tmp_path.iterdir())
