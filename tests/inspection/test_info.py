"""`sinkprune info`: zeros counted, readers named, tables printed, errors in one line."""

import io
import json
import shutil

import pytest
import torch
from checkpoint_files import LEGACY
from checkpoint_maker import CONFIG, TARGETS, model, two_of_four, unstructured, write_dense
from rich.console import Console
from safetensors.torch import load_file, save_file
from structure_cases import dense

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import convert_checkpoint
from sinkprune_plugin.inspection.info import inspect_checkpoint
from sinkprune_plugin.inspection.table import print_info

PRUNED = {"weights": 3 * (16 * 32 + 32 * 48), "zeros": 3 * (16 * 32 + 32 * 48) // 2, "sparsity": 0.5}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def info(directory):
    return json.loads(json.dumps(inspect_checkpoint(directory).to_json()))


def printed(directory, width=80):
    text = io.StringIO()
    print_info(inspect_checkpoint(directory), Console(file=text, width=width))
    return [line.split() for line in text.getvalue().splitlines()]


def sparse(tmp_path, to="auto", weight=two_of_four, config=CONFIG, **options):
    source = write_dense(tmp_path / "source", model(weight), shards=2, config=config)
    convert_checkpoint(source, tmp_path / to, to, **options)
    return tmp_path / to


@pytest.mark.parametrize("to", ["dense", "sparse-bitmask", "sparse-24-bitmask"])
def test_zeros_and_bytes_are_counted_by_type_block_and_layer(tmp_path, to):
    found = info(sparse(tmp_path, to))
    files = list((tmp_path / to).glob("*.safetensors"))
    assert found["format"] == to
    assert found["layout"] == (None if to == "dense" else "sinkprune")
    assert (found["files"], found["tensors"], found["quantization"]) == (2, 15, None)
    assert found["file_bytes"] == sum(file.stat().st_size for file in files)
    # Per block: norm, bias and the two weights; two tables of 12 × 32; the buffer of 4 int64.
    assert found["dense_bytes"] == 3 * 2 * (32 + 16 + 16 * 32 + 32 * 48) + 2 * 2 * 12 * 32 + 32
    parts = {"dense": 2 * 2048, "sparse-24-bitmask": 2048 + 256 + 32, "sparse-bitmask": 2048 + 256 + 8 * 48 + 32}
    assert found["dense_bytes"] - found["stored_bytes"] == 3 * (2 * 2048 - parts[to])
    assert found["ratio"] == found["stored_bytes"] / found["dense_bytes"]
    assert found["total"] == {**PRUNED, "structure": "2:4", "structures": {"2:4": 6}}
    assert {name: entry["weights"] for name, entry in found["by_type"].items()} == {
        "down_proj": 3 * 32 * 48,
        "q_proj": 3 * 16 * 32,
    }
    assert [*found["by_block"]] == [f"model.layers.{layer}" for layer in range(3)]
    assert found["by_block"]["model.layers.2"]["q_proj"] == {
        "weights": 512,
        "zeros": 256,
        "sparsity": 0.5,
        "structure": "2:4",
        "structures": {"2:4": 1},
    }
    assert found["by_layer"].keys() == {name.removesuffix(".weight") for name in TARGETS} | {
        "lm_head",
        "model.embed_tokens",
    }
    # Half zeros, in no block: neither pruned nor part of any sum.
    head = found["by_layer"]["lm_head"]
    assert (head["role"], head["block"], head["zeros"], head["sparse"]) == ("outside", None, 192, False)
    assert found["by_layer"]["model.embed_tokens"]["role"] == "embedding"
    layer = found["by_layer"]["model.layers.1.mlp.down_proj"]
    assert (layer["role"], layer["block"], layer["type"]) == ("linear", "model.layers.1", "down_proj")
    assert (layer["dtype"], layer["shape"], layer["sparse"]) == ("BF16", [32, 48], to != "dense")


def test_keys_are_stable(tmp_path):
    found = info(sparse(tmp_path))
    assert found["schema"] == 1
    assert [*found] == [
        *("schema", "path", "model_type", "family", "format", "layout", "quantization", "files", "tensors"),
        *("file_bytes", "stored_bytes", "dense_bytes", "ratio"),
        *("parameters", "unpruned_parameters", "block_sizes"),
        *("total", "by_type", "by_block", "by_layer", "uncounted", "readers"),
    ]
    assert found["by_layer"]["lm_head"].keys() == {
        *("weights", "zeros", "sparsity", "structure", "structures"),
        *("role", "type", "block", "dtype", "shape", "sparse"),
    }
    assert [reader["reader"] for reader in found["readers"]] == [
        "transformers with this package",
        "transformers without this package",
        "llm-compressor with this package",
        "compressed-tensors 0.9 to 0.14",
        "vLLM with this package",
    ]


@pytest.mark.parametrize("name", ["sparse-24-bitmask", "sparse-bitmask", "sparse-bitmask-fp16"])
def test_checkpoints_of_the_old_writer(name):
    found = info(LEGACY / name)
    weights = load_file(LEGACY / name / "dense" / "model.safetensors")
    pruned = [tensor for key, tensor in weights.items() if "_proj.weight" in key]
    assert found["total"]["weights"] == 34816
    assert found["total"]["zeros"] == sum(int((tensor == 0).sum()) for tensor in pruned)
    assert found["total"]["structure"] == ("2:4" if "24" in name else "unstructured")
    assert found["layout"] == "legacy"
    assert loads(found) == ["yes", "no", "yes", "yes", "yes"]


def loads(found):
    return [reader["loads"] for reader in found["readers"]]


def test_readers_are_those_of_the_support_matrix(tmp_path):
    assert loads(info(sparse(tmp_path))) == ["yes", "no", "yes", "no", "yes"]
    assert loads(info(sparse(tmp_path, "sparse-bitmask", layout="legacy"))) == ["yes", "no", "yes", "yes", "yes"]
    assert loads(info(sparse(tmp_path, "dense"))) == ["yes", "yes", "yes", "untested", "yes"]
    (tmp_path / "dense" / "config.json").write_text(json.dumps({"model_type": "DREAM"}))
    found = info(tmp_path / "dense")
    assert (found["family"], loads(found)) == ("dream", ["yes", "untested", "yes", "untested", "yes"])


def test_what_old_releases_wrote_for_dense_weights(tmp_path):
    block = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}}
    source = write_dense(tmp_path / "source", model(), config=CONFIG | {"quantization_config": block})
    found = info(source)
    assert (found["format"], found["layout"], found["quantization"]) == ("dense", None, None)
    assert loads(found)[:3] == ["yes", "no", "yes"]


def test_names_from_before_0_9(tmp_path):
    source = sparse(tmp_path, "sparse-bitmask", layout="legacy")
    for file in source.glob("*.safetensors"):
        renamed = {}
        for name, tensor in load_file(file).items():
            owner, _, part = name.rpartition(".")
            known = part in ("compressed", "bitmask", "shape", "row_offsets")
            renamed[f"{owner}.weight.{part}" if known else name] = tensor
        save_file(renamed, file)
    weight_map = {name: file.name for file in source.glob("*.safetensors") for name in load_file(file)}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    found = info(source)
    assert (found["layout"], found["total"]["structure"]) == ("before-0.9", "2:4")
    assert loads(found) == ["yes", "untested", "untested", "no", "untested"]


@pytest.mark.parametrize(
    ("dtype", "name", "old"),
    [(torch.int8, "int-quantized", "yes"), (torch.float8_e4m3fn, "float-quantized", "untested")],
)
@pytest.mark.parametrize("layout", ["sinkprune", "legacy"])
def test_a_quantized_checkpoint_is_described_dense_and_sparse(tmp_path, dtype, name, old, layout):
    tensors = model(lambda rows, columns: two_of_four(rows, columns, dtype))
    for target in TARGETS:
        tensors[f"{target}_scale"] = torch.ones(len(tensors[target]), 1)
    block = {"quant_method": "compressed-tensors", "format": name, "config_groups": {}}
    source = write_dense(tmp_path / "source", tensors, config=CONFIG | {"quantization_config": block})
    found = info(source)
    assert (found["format"], found["layout"]) == ("dense", None)
    assert found["quantization"] == {"method": "compressed-tensors", "format": name}
    assert found["total"] == {**PRUNED, "structure": "2:4", "structures": {"2:4": 6}}
    assert loads(found) == ["yes", "yes", "no", "untested", "yes"]
    convert_checkpoint(source, tmp_path / "sparse", "auto", layout=layout)
    found = info(tmp_path / "sparse")
    assert (found["format"], found["layout"]) == ("sparse-24-bitmask", layout)
    assert found["quantization"] == {"method": "compressed-tensors", "format": name}
    assert found["total"] == {**PRUNED, "structure": "2:4", "structures": {"2:4": 6}}
    assert loads(found) == ["yes", "no", "no", old if layout == "legacy" else "no", "yes"]
    text = " ".join(" ".join(line) for line in printed(tmp_path / "sparse"))
    assert f"format sparse-24-bitmask, layout {layout}, quantized by compressed-tensors ({name})" in text


def test_packed_weights_are_named_not_counted(tmp_path):
    tensors = {"model.layers.0.q_proj.weight_packed": torch.ones(4, 4, dtype=torch.int32)}
    block = {"quant_method": "gptq", "bits": 4}
    write_dense(tmp_path, tensors, config=CONFIG | {"quantization_config": block})
    found = info(tmp_path)
    assert found["uncounted"] == ["model.layers.0.q_proj.weight_packed"]
    assert found["quantization"] == {"method": "gptq", "format": None}
    assert found["total"] == {"weights": 0, "zeros": 0, "sparsity": 0.0, "structure": "dense", "structures": {}}
    assert loads(found) == ["untested"] * 5
    lines = [" ".join(line) for line in printed(tmp_path)]
    assert "zeros not counted in packed weights: model.layers.0.q_proj.weight_packed" in lines
    assert "no weight matrix in a numbered decoder block" in lines


def test_module_types_are_told_apart_by_as_many_names_as_needed(tmp_path):
    """The last name is enough, unless a block has two that end alike; experts of a block count together."""
    names = ["attn.c_proj", "mlp.c_proj", "mlp.experts.0.w1", "mlp.experts.1.w1", "attn.c_attn"]
    tensors = {f"h.{layer}.{name}.weight": two_of_four(8, 32) for layer in (0, 2, 10) for name in names}
    tensors |= {"wte.weight": dense(8, 32), "c_attn.weight": dense(8, 32), "h.0.ln_1.weight": torch.zeros(32)}
    # Three dimensions: no Linear, whatever its name.
    tensors["h.0.conv.weight"] = torch.zeros(2, 2, 2)
    write_dense(tmp_path, tensors)
    found = info(tmp_path)
    assert {name: entry["weights"] for name, entry in found["by_type"].items()} == {
        "attn.c_proj": 768,
        "mlp.c_proj": 768,
        "w1": 1536,
        "c_attn": 768,
    }
    assert [*found["by_block"]] == ["h.0", "h.2", "h.10"]
    assert found["by_block"]["h.10"]["w1"]["structures"] == {"2:4": 2}
    assert found["by_layer"]["c_attn"]["role"] == "outside"
    assert ["10", "0.5000", "0.5000", "0.5000", "0.5000", "0.5000"] in printed(tmp_path)


def test_the_table_shows_types_blocks_and_what_is_outside(tmp_path):
    tensors = model() | {TARGETS[0]: dense(32, 48), TARGETS[2]: unstructured(32, 48)}
    del tensors[TARGETS[1]]
    lines = printed(write_dense(tmp_path, tensors))
    assert ["q_proj", "2", "1,024", "0.5000", "2:4"] in lines
    mixed = ["down_proj", "3", "4,608", f"{(768 + int((tensors[TARGETS[2]] == 0).sum())) / 4608:.4f}", "mixed"]
    row = next(line for line in lines if line[:1] == ["down_proj"])
    assert row[:5] == mixed
    assert {"(1", "×", "dense,", "1", "unstructured,", "2:4)"} >= set(row[5:])
    header = lines.index(["block", "down_proj", "q_proj", "all"])
    assert lines[header - 1] == ["sparsity", "by", "block", "of", "model.layers"]
    assert lines[header + 2] == ["0", "0.0000", "–", "0.0000"]
    assert lines[header + 4] == ["2", "0.5000", "0.5000", "0.5000"]
    assert ["lm_head", "384", "0.5000"] in lines
    assert ["model.embed_tokens", "embedding", "384", "0.0000"] in lines


def test_table_of_many_types_in_a_narrow_terminal(tmp_path):
    types = [f"projection_{number}" for number in range(12)]
    write_dense(tmp_path, {f"layers.0.{name}.weight": two_of_four(4, 32) for name in types})
    lines = printed(tmp_path, width=60)
    headers = [line[1:] for line in lines if line[:1] == ["block"]]
    assert [name for header in headers for name in header] == [*info(tmp_path)["by_type"], "all"]
    assert {len(header) for header in headers} == {3, 4}
    assert {tuple(line) for line in lines if line[:1] == ["0"]} == {("0", *["0.5000"] * count) for count in (3, 4)}


def test_hostile_text_is_printed_as_text(tmp_path):
    write_dense(tmp_path, model(), config={"model_type": "[red]x[/nothing]\n\x1b[2J" + "y" * 500})
    text = " ".join(" ".join(line) for line in printed(tmp_path))
    assert "model type [red]x[/nothing]??[2Jyyyy" in text
    assert "\x1b" not in text
    assert len(inspect_checkpoint(tmp_path).model_type) == 120


def test_markup_in_the_names_of_modules_is_printed_as_text(tmp_path):
    names = ["layers.0.[b]q[/b].weight", "layers.[b]1[/b].0.k.weight", "[i]head[/i].weight"]
    write_dense(tmp_path, {name: dense(4, 8) for name in names})
    text = "\n".join(" ".join(line) for line in printed(tmp_path))
    for shown in ("[b]q[/b] 1 32", "layers.[b]1[/b]", "[i]head[/i]"):
        assert shown in text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "has no config.json"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff{"), "isn't readable JSON"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "isn't readable JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "holds a list, not a mapping"),
        (lambda folder: [file.unlink() for file in folder.glob("*.safetensors")], r"no \*\.safetensors"),
        (lambda folder: (folder / "model-00001-of-00002.safetensors").unlink(), "names model-00001-of-00002"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "has neither"),
        (lambda folder: _cut(folder / "model-00002-of-00002.safetensors"), "can't be read: .* is truncated"),
        (lambda folder: _edit(folder, {"format": "os:system"}), "is 'os:system'; the formats are dense, "),
        (lambda folder: _edit(folder, {"format": "dense"}), "is part of a sparse weight"),
        (lambda folder: (folder / "config.json").write_text("{}"), "is part of a sparse weight"),
        (lambda folder: (folder / "config.json").write_text('{"quantization_config": 3}'), "not a mapping"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, damage, message):
    folder = sparse(tmp_path)
    damage(folder)
    with pytest.raises(UsageError, match=message) as raised:
        inspect_checkpoint(folder)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


def test_values_that_contradict_the_mask(tmp_path):
    folder = sparse(tmp_path, "sparse-bitmask")
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith("bitmask"):
                tensors[name][0, 0] ^= 1
        save_file(tensors, file)
    with pytest.raises(UsageError, match=r"can't be read: model\.layers\.\d\..*\.weight \(model-0000.* bits set"):
        inspect_checkpoint(folder)


def _cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def _edit(folder, sparsity):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["sparsity_config"] = sparsity
    (folder / "config.json").write_text(json.dumps(config))
