"""Whole checkpoints: saved, opened, converted."""

import json

import pytest
import torch
from checkpoint_files import FORMATS, LEGACY, LEGACY_NAMES, OTHER_FILES, config_of, files_of, stored_names
from checkpoint_maker import CONFIG, TARGETS, assert_same, model, two_of_four, unstructured, write_dense
from safetensors.torch import load_file, save_file

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import (
    CheckpointFormat,
    convert_checkpoint,
    load_sparse_checkpoint,
    read_sparsity_config,
    save_sparse_checkpoint,
)


@pytest.mark.parametrize("name", LEGACY_NAMES)
def test_legacy_checkpoints_load_bit_exactly(name):
    loaded = load_sparse_checkpoint(LEGACY / name)
    assert_same(loaded, load_file(LEGACY / name / "dense" / "model.safetensors"))
    assert loaded.sparse_names == {f"{module}.weight" for module in loaded.sparsity.targets}
    for key, tensor in loaded.items():
        assert loaded.spec(key).shape == tuple(tensor.shape)


@pytest.mark.parametrize("name", LEGACY_NAMES)
def test_legacy_layout_is_the_old_file_byte_for_byte(name, tmp_path):
    convert_checkpoint(LEGACY / name, tmp_path / "dense", "dense")
    written = convert_checkpoint(tmp_path / "dense", tmp_path / "sparse", "auto", layout="legacy")
    assert written.format == name.removesuffix("-fp16")
    for folder, old in (("dense", LEGACY / name / "dense"), ("sparse", LEGACY / name)):
        new = tmp_path / folder / "model.safetensors"
        assert new.read_bytes() == (old / "model.safetensors").read_bytes()
    old, new = config_of(LEGACY / name), config_of(tmp_path / "sparse")
    for config in (old, new):
        # Informational; the fixtures were written with a rounded number and another version, and without the
        # embeddings.
        config["quantization_config"]["sparsity_config"].pop("global_sparsity")
        config["quantization_config"].pop("version")
    assert new == old


@pytest.mark.parametrize("form", ["mapping", "pairs", "iterator"])
@pytest.mark.parametrize("sparse_format", FORMATS)
def test_saved_and_loaded(tmp_path, sparse_format, form):
    tensors = model()
    given = {"mapping": tensors, "pairs": tensors.items(), "iterator": (pair for pair in tensors.items())}[form]
    written = save_sparse_checkpoint(given, tmp_path / "out", format=sparse_format, config=CONFIG)
    assert written.format == sparse_format
    assert written.targets == (() if sparse_format == "dense" else tuple(TARGETS))
    loaded = load_sparse_checkpoint(tmp_path / "out")
    assert loaded.format is CheckpointFormat(sparse_format)
    assert loaded.sparse_names == set(written.targets)
    assert_same(loaded, tensors)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    if sparse_format == "dense":
        assert config_of(tmp_path / "out") == CONFIG


def test_config_of_a_sparse_checkpoint(tmp_path):
    save_sparse_checkpoint(model(), tmp_path / "out", config=CONFIG)
    text = (tmp_path / "out" / "config.json").read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"
    sparsity = read_sparsity_config(config)
    assert sparsity.quant_method == "compressed-tensors-sparse"
    assert sparsity.targets == tuple(sorted(name.removesuffix(".weight") for name in TARGETS))
    assert sparsity.ignore == ("lm_head",)
    tensors = [tensor for tensor in model().values() if tensor.is_floating_point()]
    zeros = sum(int((tensor == 0).sum()) for tensor in tensors) / sum(tensor.numel() for tensor in tensors)
    assert sparsity.global_sparsity == round(zeros, 4)
    assert config.items() >= CONFIG.items()


def test_auto_takes_the_smallest_that_fits(tmp_path):
    def auto(tensors, name):
        return save_sparse_checkpoint(tensors, tmp_path / name, config=CONFIG)

    assert auto(model(), "a").format == "sparse-24-bitmask"
    assert auto(model(unstructured), "b").format == "sparse-bitmask"
    mixed = model() | {TARGETS[0]: unstructured(32, 48)}
    assert auto(mixed, "c").format == "sparse-bitmask"
    dense = auto(model(lambda rows, columns: torch.ones(rows, columns)), "d")
    assert dense.format == "dense"
    assert dense.notes == ("no weight has enough zeros; the checkpoint is dense",)
    assert config_of(tmp_path / "d") == CONFIG
    # Too few zeros to pay for the mask in one layer, and that layer alone stays dense.
    some = auto(model(unstructured) | {TARGETS[0]: unstructured(32, 48, zeros=0.02)}, "e")
    assert set(some.targets) == set(TARGETS[1:])


def test_stored_bytes_are_those_of_values_masks_and_shapes(tmp_path):
    tensors = {"layers.0.weight": two_of_four(256, 512), "layers.1.weight": two_of_four(256, 512)}
    written = save_sparse_checkpoint(tensors, tmp_path / "24", config={})
    # Half the values, a bit for each weight, and the two shapes.
    assert written.stored_bytes == 2 * (256 * 256 * 2 + 256 * 64 + 16)
    assert written.stored_bytes / written.dense_bytes <= 0.5626
    tensors = {"layers.0.weight": unstructured(64, 256, zeros=0.75)}
    nonzeros = int(tensors["layers.0.weight"].count_nonzero())
    written = save_sparse_checkpoint(tensors, tmp_path / "75", format="sparse-bitmask")
    assert written.stored_bytes == 2 * nonzeros + 64 * 32 + 64 * 8 + 16
    assert (tmp_path / "75" / "model.safetensors").stat().st_size - written.stored_bytes < 500


def test_targets_named_by_the_user_are_stored_sparse(tmp_path):
    tensors = model()
    written = save_sparse_checkpoint(tensors, tmp_path / "a", format="sparse-bitmask", targets=["lm_head.weight"])
    assert written.targets == ("lm_head.weight",)
    assert_same(load_sparse_checkpoint(tmp_path / "a"), tensors)
    # Converting keeps it sparse, though it isn't named again.
    again = convert_checkpoint(tmp_path / "a", tmp_path / "b", "sparse-24-bitmask")
    assert set(again.targets) == {"lm_head.weight", *TARGETS}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nothing.weight", "target nothing.weight is no tensor of this checkpoint"),
        ("model.layers.0.input_layernorm.weight", r"is BF16 of shape \[32\]; only 2-D tensors named"),
        ("model.layers.0.self_attn.q_proj.bias", "only 2-D tensors named"),
        ("model.rotary.inv_freq", "target model.rotary.inv_freq is I64"),
    ],
)
def test_targets_that_cannot_be(tmp_path, target, message):
    with pytest.raises(UsageError, match=message):
        save_sparse_checkpoint(model(), tmp_path / "out", targets=[target])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("targets", [None, TARGETS])
def test_2_of_4_asked_for_a_weight_that_is_not(tmp_path, targets):
    tensors = model() | {name: unstructured(32, 48) for name in TARGETS[::2]}
    excess = int((tensors[TARGETS[0]].view(-1, 4).count_nonzero(dim=1) > 2).sum())
    message = rf"{TARGETS[0]} isn't 2:4: {excess} of its 384 groups of 4 .* 2 more weights don't fit either; use sparse"
    with pytest.raises(UsageError, match=message):
        save_sparse_checkpoint(tensors, tmp_path / "out", format="sparse-24-bitmask", targets=targets)
    with pytest.raises(UsageError, match="has 30 columns, which isn't a multiple of 4"):
        save_sparse_checkpoint({"layers.0.weight": torch.zeros(8, 30)}, tmp_path / "out", format="sparse-24-bitmask")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sparse_format", FORMATS[1:])
def test_nothing_to_compress(tmp_path, sparse_format):
    tensors = {"layers.0.weight": torch.ones(8, 8)}
    with pytest.raises(UsageError, match=f"no weight has enough zeros to be stored as {sparse_format}"):
        save_sparse_checkpoint(tensors, tmp_path / "out", format=sparse_format)


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("sparse_format", FORMATS[1:])
@pytest.mark.parametrize("layout", ["sinkprune", "legacy"])
def test_converted_there_and_back(tmp_path, sparse_format, layout, shards):
    source = write_dense(tmp_path / "source", model(), shards)
    before = files_of(source)
    convert_checkpoint(source, tmp_path / "sparse", sparse_format, layout=layout)
    convert_checkpoint(tmp_path / "sparse", tmp_path / "back", "dense")
    assert files_of(source) == before
    for name in OTHER_FILES:
        assert (tmp_path / "sparse" / name).read_bytes() == before[name]
    weights = {name for name in before if name.endswith(".safetensors")}
    assert {path.name for path in (tmp_path / "sparse").glob("*.safetensors")} == weights
    assert {name: (tmp_path / "back" / name).read_bytes() for name in weights} == {
        name: before[name] for name in weights
    }
    assert config_of(tmp_path / "back") == CONFIG
    method = config_of(tmp_path / "sparse")["quantization_config"]["quant_method"]
    assert method == ("compressed-tensors" if layout == "legacy" else "compressed-tensors-sparse")
    if shards > 1:
        index = json.loads((tmp_path / "sparse" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == stored_names(tmp_path / "sparse")
        sizes = [tensor.nbytes for file in weights for tensor in load_file(tmp_path / "sparse" / file).values()]
        assert index["metadata"] == {"total_size": sum(sizes)}


def test_between_the_sparse_formats(tmp_path):
    source = write_dense(tmp_path / "source", model(), shards=2)
    convert_checkpoint(source, tmp_path / "24", "sparse-24-bitmask")
    convert_checkpoint(tmp_path / "24", tmp_path / "bitmask", "sparse-bitmask")
    convert_checkpoint(tmp_path / "bitmask", tmp_path / "24 again", "sparse-24-bitmask", layout="legacy")
    assert_same(load_sparse_checkpoint(tmp_path / "24 again"), model())
    for file in (tmp_path / "24").glob("*.safetensors"):
        assert (tmp_path / "24 again" / file.name).read_bytes() == file.read_bytes()


def test_a_checkpoint_is_resharded_up_and_down(tmp_path):
    source = write_dense(tmp_path / "source", model())
    convert_checkpoint(source, tmp_path / "small", "sparse-bitmask", max_shard_bytes=4000)
    files = sorted((tmp_path / "small").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(sum(tensor.nbytes for tensor in load_file(file).values()) <= 4000 for file in files)
    assert_same(load_sparse_checkpoint(tmp_path / "small"), model())
    convert_checkpoint(tmp_path / "small", tmp_path / "one", "sparse-bitmask", max_shard_bytes=10**9)
    assert {path.name for path in (tmp_path / "one").glob("model*")} == {"model.safetensors"}


@pytest.mark.parametrize("sparse_format", FORMATS[1:])
def test_parts_of_a_weight_in_different_files(tmp_path, sparse_format):
    save_sparse_checkpoint(model(), tmp_path / "whole", format=sparse_format, config=CONFIG)
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    (tmp_path / "spread").mkdir()
    config = config_of(tmp_path / "whole")
    # Whoever splits the files again removes the digests.
    del config["quantization_config"]["sinkprune_sha256"]
    (tmp_path / "spread" / "config.json").write_text(json.dumps(config))
    parts = ["compressed", "bitmask", "shape", "row_offsets"]
    weight_map = {}
    for name in tensors:
        suffix = name.rpartition(".")[2]
        weight_map[name] = f"{parts.index(suffix) if suffix in parts else 4}.safetensors"
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, tmp_path / "spread" / file)
    (tmp_path / "spread" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(load_sparse_checkpoint(tmp_path / "spread"), model())
    # Files that get nothing are skipped.
    convert_checkpoint(tmp_path / "spread", tmp_path / "dense", "dense")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) == 2
    assert_same(load_sparse_checkpoint(tmp_path / "dense"), model())


def test_layout_before_0_9(tmp_path):
    """Every tensor compressed, full names, configuration under another key."""
    from sinkprune_plugin.formats.codecs import bitmask

    tensors = {name: tensor for name, tensor in model(unstructured).items() if tensor.is_floating_point()}
    stored = {}
    for name, tensor in tensors.items():
        parts = bitmask.compress(tensor.reshape(-1, tensor.shape[-1]))
        if tensor.ndim == 1:
            parts["shape"] = parts["shape"][1:]
            parts["bitmask"], parts["row_offsets"] = parts["bitmask"][0], parts["row_offsets"][0]
        stored |= {f"{name}.{part}": value.clone() for part, value in parts.items()}
    save_file(stored, tmp_path / "model.safetensors")
    config = CONFIG | {"compression_config": {"sparsity_config": {"format": "sparse-bitmask", "global_sparsity": 0.5}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(load_sparse_checkpoint(tmp_path), tensors)
    written = convert_checkpoint(tmp_path, tmp_path / "new", "sparse-bitmask")
    assert set(written.targets) == {*TARGETS, "lm_head.weight"}
    assert_same(load_sparse_checkpoint(tmp_path / "new"), tensors)
    assert "compression_config" not in config_of(tmp_path / "new")
