"""Damaged checkpoints of every kind: read correctly or refused in one short line, within little memory and time."""

import contextlib
import json
import os
import shutil
import struct

import pytest
import torch
from checkpoint_maker import CONFIG, two_of_four, unstructured, write_dense
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limited_memory import limited_memory
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import convert_checkpoint, load_sparse_checkpoint, save_sparse_checkpoint
from sinkprune_plugin.inspection.info import inspect_checkpoint

INDEX = "model.safetensors.index.json"
SIZES = [0, 1, 2, 3, 7, 8, 255, 1 << 29, 1 << 31, 1 << 40, 1 << 61, (1 << 62) - 1, 1 << 63, -1]
NAMES = [
    "",
    "a",
    "1" * 5000,
    "layers." + "9" * 5000 + ".q.weight",
    "b" * 100_000,
    "c\nd",
    "e\x1b[2J",
    "f\ud800",
    "ü" * 300,
]
NAMES += ["l.0.a.weight", "l.0.a.compressed", "l.0.a.row_offsets", ".bitmask", "shape", "l.0.a.weight.shape"]
FILES = ["x" * 300 + ".safetensors", "../a.safetensors", "/dev/zero", "model.safetensors", "a\nb.safetensors", "", "."]
LINKS = ["/etc/hostname", "/dev/zero", "..", ".", "nowhere", "../outside/secret", "config.json", "sub/../config.json"]
VALUES = [None, True, -1, 1e400, float("nan"), 10**30, [], {}, [[]], "sparse-24-bitmask", "os:system", *NAMES[:6]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Small checkpoints: dense and in both formats, in one file and in several, with and without digests."""
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    for sparse_format in ("sparse-bitmask", "sparse-24-bitmask"):
        weight = two_of_four(4, 12) if sparse_format == "sparse-24-bitmask" else unstructured(4, 11)
        tensors = {"l.0.a.weight": weight, "l.0.b.weight": weight + 0, "l.0.norm": torch.ones(3)}
        targets = ["l.0.a.weight", "l.0.b.weight"]
        for size in (100, 10_000):
            options = {"config": CONFIG, "max_shard_bytes": size, "targets": targets, "format": sparse_format}
            save_sparse_checkpoint(tensors, folder / f"{sparse_format}-{size}", **options)
            save_sparse_checkpoint(tensors, folder / f"{sparse_format}-{size}-legacy", layout="legacy", **options)
    write_dense(folder / "dense-1", tensors)
    write_dense(folder / "dense-2", tensors, shards=2)
    save_file({}, write_dense(folder / "nothing", {}) / "model.safetensors")
    return sorted(folder.iterdir())


def weight_file(data, folder):
    return data.draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))


def split(file):
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(file, header, rest):
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + rest)


def damage_shapes(data, folder):
    """Any sizes, zero among them, with offsets that go with them or not, and a shape part that agrees or doesn't."""
    file = weight_file(data, folder)
    header, rest = split(file)
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return
    shape = data.draw(st.lists(st.sampled_from(SIZES), max_size=4))
    owner = data.draw(st.sampled_from(names)).rpartition(".")[0]
    for name in [name for name in names if name.rpartition(".")[0] == owner]:
        entry = header[name]
        if name.endswith(".shape") and len(shape) == 2 and all(0 <= size < 1 << 63 for size in shape):
            begin = entry["data_offsets"][0]
            rest = rest[:begin] + struct.pack("<2q", *shape) + rest[begin + 16 :]
            continue
        if data.draw(st.booleans()):
            halved = {"bitmask": [*shape[:-1], -(-shape[-1] // 8)] if shape else [], "row_offsets": shape[:-1]}
            entry["shape"] = halved.get(name.rpartition(".")[2], shape)
            if data.draw(st.booleans()):
                entry["data_offsets"][1] = entry["data_offsets"][0]
    if data.draw(st.booleans()):
        # Close the gaps, so that the file is complete.
        kept, end = b"", 0
        for entry in sorted((header[name] for name in names), key=lambda entry: entry["data_offsets"]):
            begin, stop = entry["data_offsets"]
            kept += rest[begin:stop]
            entry["data_offsets"] = [end, end + stop - begin]
            end += stop - begin
        rest = kept
    join(file, header, rest)


def damage_names(data, folder):
    if data.draw(st.booleans()) or not (folder / INDEX).exists():
        file = weight_file(data, folder)
        header, rest = split(file)
        if not header:
            return
        old = data.draw(st.sampled_from(sorted(header)))
        header[data.draw(st.sampled_from(NAMES))] = header.pop(old)
        join(file, header, rest)
        return
    index = json.loads((folder / INDEX).read_text())
    place = data.draw(st.sampled_from(sorted(index["weight_map"])))
    if data.draw(st.booleans()):
        index["weight_map"][place] = data.draw(st.sampled_from(FILES))
    else:
        index["weight_map"][data.draw(st.sampled_from(NAMES))] = index["weight_map"].pop(place)
    (folder / INDEX).write_text(json.dumps(index))


def damage_files(data, folder):
    """Truncated, empty, replaced, missing; other kinds of files, links, and files too large to be copied."""
    place = folder / data.draw(st.sampled_from([*sorted(file.name for file in folder.iterdir()), "extra.txt"]))
    kind = data.draw(st.sampled_from(["cut", "empty", "gone", "fifo", "directory", "huge", "link", "copy"]))
    content = place.read_bytes() if place.exists() else b"{}"
    if place.exists():
        place.unlink()
    if kind == "cut":
        place.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    elif kind == "empty":
        place.write_bytes(b"")
    elif kind == "fifo":
        os.mkfifo(place)
    elif kind == "directory":
        place.mkdir()
    elif kind == "huge":
        with place.open("wb") as stream:
            stream.truncate(1 << 34)
    elif kind == "link":
        place.symlink_to(data.draw(st.sampled_from([*LINKS, place.name])))
    elif kind == "copy":
        place.write_bytes(content)
        (folder / data.draw(st.sampled_from(["model.safetensors", "config.json", INDEX]))).write_bytes(content)


def damage_configuration(data, folder):
    file = data.draw(st.sampled_from([folder / "config.json", folder / INDEX]))
    if not file.exists():
        return

    def change(value):
        if isinstance(value, dict) and value and data.draw(st.integers(0, 3)):
            key = data.draw(st.sampled_from(sorted(value)))
            return value | {key: change(value[key])}
        return data.draw(st.sampled_from(VALUES))

    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def damage_bytes(data, folder):
    damage_weights(data, folder, "*")


def damage_weights(data, folder, pattern="*.safetensors*"):
    file = data.draw(st.sampled_from(sorted(folder.glob(pattern))))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)


DAMAGES = [damage_shapes, damage_names, damage_files, damage_configuration, damage_bytes]


@settings(deadline=10_000, max_examples=300, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_damage_is_refused_or_harmless(bases, tmp_path, data):
    """No other exception than UsageError, no screenful, no gigabytes, nothing from outside, nothing half done."""
    folder, out = tmp_path / "c", tmp_path / "out"
    for place in (folder, out):
        shutil.rmtree(place, ignore_errors=True)
    (tmp_path / "outside").mkdir(exist_ok=True)
    (tmp_path / "outside" / "secret").write_text("secret")
    shutil.copytree(data.draw(st.sampled_from(bases)), folder)
    damage = data.draw(st.sampled_from(DAMAGES))
    damage(data, folder)
    with limited_memory():
        outcomes = [
            _outcome(lambda: dict(load_sparse_checkpoint(folder))),
            _outcome(lambda: inspect_checkpoint(folder).to_json()),
            _outcome(lambda: convert_checkpoint(folder, out, data.draw(st.sampled_from(["dense", "auto"])))),
        ]
    if outcomes[0] is None and outcomes[2] is None:
        assert dict(load_sparse_checkpoint(out)).keys() == dict(load_sparse_checkpoint(folder)).keys()
    if outcomes[2] is None:
        for path in out.rglob("*"):
            assert not path.is_symlink()
            assert path.is_dir() or b"secret" not in path.read_bytes()
    else:
        assert not out.exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"c", "out", "outside"}


def _outcome(use):
    """None where all went well, else the message."""
    try:
        use()
    except UsageError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 3000
        return message
    return None


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """A Llama of one block in both formats, in one file and in several, without digests: each would reveal damage."""
    folder = tmp_path_factory.mktemp("llamas")
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 16}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    tensors = {name: tensor.bfloat16() for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    for name, tensor in tensors.items():
        if ".layers." in name and tensor.ndim == 2:
            tensors[name] = two_of_four(*tensor.shape)
    config = config.to_diff_dict() | {"architectures": ["LlamaForCausalLM"]}
    targets = [name for name, tensor in tensors.items() if ".layers." in name and tensor.ndim == 2]
    for sparse_format in ("sparse-bitmask", "sparse-24-bitmask"):
        for size in (500, 10_000):
            place = folder / f"{sparse_format}-{size}"
            options = {"config": config, "max_shard_bytes": size, "targets": targets, "format": sparse_format}
            save_sparse_checkpoint(tensors, place, **options)
            written = json.loads((place / "config.json").read_text())
            del written["quantization_config"]["sinkprune_sha256"]
            (place / "config.json").write_text(json.dumps(written))
    return sorted(folder.iterdir())


@settings(deadline=None, max_examples=80, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_transformers_takes_no_sparse_checkpoint_that_we_refuse(llamas, tmp_path, data):
    """And gives the same weights where both accept it. What it says about incomplete files isn't compared."""
    folder = tmp_path / "c"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(data.draw(st.sampled_from(llamas)), folder)
    data.draw(st.sampled_from([damage_shapes, damage_names, damage_weights]))(data, folder)
    ours = None
    with contextlib.suppress(UsageError):
        ours = dict(load_sparse_checkpoint(folder))
    try:
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True).state_dict()
    except Exception:  # noqa: BLE001 - its own business
        # What a model can't be made of may still be a checkpoint.
        return
    assert ours is not None
    for name, tensor in theirs.items():
        if name in ours:
            assert torch.equal(tensor.view(torch.uint8), ours[name].to(tensor.dtype).view(torch.uint8)), name
