"""`sinkprune convert` and `sinkprune info` as a user runs them, on the embedded model pruned by magnitude."""

import json
from pathlib import Path

import pytest
import torch
from command_line import run_here, run_process
from safetensors.torch import load_file, save_file

from sinkprune_plugin.formats import load_sparse_checkpoint
from sinkprune_plugin.loading import EMBEDDED_MODEL

# Six blocks: four 192 × 192 weights, two 512 × 192 and one 192 × 512.
PRUNED = 6 * (4 * 192 * 192 + 3 * 192 * 512)
DENSE = 2 * (PRUNED + 2 * 2048 * 192 + 13 * 192)
ROWS = 6 * (4 * 192 + 2 * 512 + 192)
# Half the values in bfloat16, a bit for each weight, and per weight 16 bytes of shape.
SIZES = {"dense": DENSE, "sparse-24-bitmask": DENSE - 2 * PRUNED + PRUNED + PRUNED // 8 + 42 * 16}
SIZES["sparse-bitmask"] = SIZES["sparse-24-bitmask"] + 8 * ROWS


def checked(*arguments, run=run_here):
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fails(message, *arguments, run=run_here):
    done = run(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("sinkprune: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _prune(directory, prune):
    directory.mkdir()
    for file in EMBEDDED_MODEL.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if ".blocks." in name and tensor.ndim == 2:
            tensors[name] = prune(tensor)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _lowest(scores, count):
    lowest = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, lowest, True)


@pytest.fixture(scope="module")
def two_of_four(tmp_path_factory):
    def prune(weight):
        return weight.masked_fill(_lowest(weight.float().abs().view(-1, 4), 2).view(weight.shape), 0)

    return _prune(tmp_path_factory.mktemp("convert") / "two-of-four", prune)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """50 % of each row."""

    def prune(weight):
        return weight.masked_fill(_lowest(weight.float().abs(), weight.shape[1] // 2), 0)

    return _prune(tmp_path_factory.mktemp("convert") / "half", prune)


@pytest.mark.parametrize("to", ["sparse-bitmask", "sparse-24-bitmask"])
@pytest.mark.parametrize("layout", ["sinkprune", "legacy"])
def test_there_and_back(two_of_four, tmp_path, to, layout):
    said = checked("convert", two_of_four, "--to", to, "--layout", layout, "--output", tmp_path / "sparse")
    share = SIZES[to] / DENSE
    assert said == f"{to}: {SIZES[to] / 1e6:.2f} MB, {share:.4f} of dense, written to {tmp_path / 'sparse'}\n"
    block = json.loads((tmp_path / "sparse" / "config.json").read_text())["quantization_config"]
    assert block["quant_method"] == {"sinkprune": "compressed-tensors-sparse", "legacy": "compressed-tensors"}[layout]
    assert len(load_sparse_checkpoint(tmp_path / "sparse").sparse_names) == 42
    said = checked("convert", tmp_path / "sparse", "--to", "dense", "--output", tmp_path / "dense")
    assert said == f"dense: {DENSE / 1e6:.2f} MB, 1.0000 of dense, written to {tmp_path / 'dense'}\n"
    expected, found = contents(two_of_four), contents(tmp_path / "dense")
    # config.json is rewritten; everything else is identical to the byte, the weights' file included.
    assert json.loads(expected.pop(Path("config.json"))) == json.loads(found.pop(Path("config.json")))
    assert found == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "sparse"]


def test_auto_takes_the_smallest_format_that_fits(two_of_four, half, tmp_path):
    said = checked("convert", two_of_four, "--to", "auto", "--output", tmp_path / "a")
    assert said.startswith("sparse-24-bitmask: ")
    said = checked("convert", half, "--to", "auto", "--output", tmp_path / "b", run=run_process)
    assert said.startswith(f"sparse-bitmask: {SIZES['sparse-bitmask'] / 1e6:.2f} MB, ")
    said = checked("convert", EMBEDDED_MODEL, "--to", "auto", "--output", tmp_path / "c")
    assert said.splitlines()[0] == "no weight has enough zeros; the checkpoint is dense"
    assert said.splitlines()[1].startswith("dense: 6.89 MB, 1.0000 of dense")


def test_info_of_each_format(two_of_four, half, tmp_path):
    checked("convert", two_of_four, "--to", "sparse-24-bitmask", "--output", tmp_path / "sparse")
    found = json.loads(checked("info", tmp_path / "sparse", "--json"))
    assert (found["format"], found["layout"], found["family"]) == ("sparse-24-bitmask", "sinkprune", "llada")
    assert (found["stored_bytes"], found["dense_bytes"]) == (SIZES["sparse-24-bitmask"], DENSE)
    assert found["file_bytes"] == (tmp_path / "sparse" / "model.safetensors").stat().st_size
    two_of_four_total = {"weights": PRUNED, "zeros": PRUNED // 2, "sparsity": 0.5, "structure": "2:4"}
    assert found["total"] == {**two_of_four_total, "structures": {"2:4": 42}}
    assert found["by_layer"]["model.transformer.ff_out"]["role"] == "outside"
    table = checked("info", tmp_path / "sparse").splitlines()
    assert "format sparse-24-bitmask, layout sinkprune" in table
    assert ["all", "42", f"{PRUNED:,}", "0.5000", "2:4"] in map(str.split, table)
    # The same weights, regardless of the format.
    source = json.loads(checked("info", two_of_four, "--json"))
    assert (source["format"], source["ratio"]) == ("dense", 1.0)
    for key in ("total", "by_type", "by_block"):
        assert source[key] == found[key]
    found = json.loads(checked("info", half, "--json"))
    assert found["total"] == {**two_of_four_total, "structure": "unstructured", "structures": {"unstructured": 42}}


def test_refused_and_nothing_left_behind(two_of_four, half, tmp_path):
    def refuses(message, source, *options, output=None):
        before = contents(tmp_path)
        fails(message, "convert", source, "--output", output or tmp_path / "out", *options)
        assert contents(tmp_path) == before
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*"))

    refuses("is 'nonsense'; the formats are dense, sparse-bitmask, sparse-24-bitmask", two_of_four, "--to", "nonsense")
    refuses("layout is 'nonsense'; the layouts are sinkprune, legacy", two_of_four, "--to", "auto", "--layout",
            "nonsense")  # fmt: skip
    refuses("Missing option '--to'", two_of_four)
    name = "model.transformer.blocks.0.attn_out.weight"
    groups = (load_file(half / "model.safetensors")[name].view(-1, 4) != 0).sum(dim=1)
    refuses(
        f"{name} isn't 2:4: {int((groups > 2).sum())} of its 9216 groups of 4 have more than 2 non-zeros, and 41 more",
        half,
        *("--to", "sparse-24-bitmask"),
    )
    refuses("no weight has enough zeros to be stored as sparse-bitmask", EMBEDDED_MODEL, "--to", "sparse-bitmask")
    refuses("isn't a directory", tmp_path / "nowhere", "--to", "dense")
    empty = tmp_path / "empty"
    empty.mkdir()
    refuses("has neither model.safetensors nor", empty, "--to", "dense")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    refuses("exists and has 1 entries; choose another directory or pass --overwrite", two_of_four, "--to", "dense",
            output=taken)  # fmt: skip
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text("{}")
    (damaged / "model.safetensors").write_bytes((two_of_four / "model.safetensors").read_bytes()[:-1])
    refuses("is truncated", damaged, "--to", "dense")
    before = contents(two_of_four)
    refuses("exists and has 5 entries", two_of_four, "--to", "sparse-24-bitmask", output=two_of_four)
    assert contents(two_of_four) == before


def test_overwrite_replaces_the_output_even_in_place(half, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    checked("convert", half, "--to", "auto", "--output", out, "--overwrite")
    assert not (out / "old.txt").exists()
    # In place: what is replaced is read to the end first.
    checked("convert", out, "--to", "dense", "--output", out, "--overwrite")
    assert contents(out)[Path("model.safetensors")] == contents(half)[Path("model.safetensors")]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_checkpoint_without_tensors(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({}, tmp_path / "model.safetensors")
    said = checked("convert", tmp_path, "--to", "dense", "--output", tmp_path / "out")
    assert said == f"dense: 0.00 MB, 0.0000 of dense, written to {tmp_path / 'out'}\n"
    assert json.loads(checked("info", tmp_path, "--json"))["total"]["weights"] == 0


def test_info_refuses_in_one_line(two_of_four, tmp_path):
    fails("has no config.json", "info", tmp_path / "nowhere", run=run_process)
    (tmp_path / "config.json").write_text("{}")
    fails("no *.safetensors", "info", tmp_path, "--json")
    (tmp_path / "model.safetensors").write_bytes((two_of_four / "model.safetensors").read_bytes()[:-1])
    fails("is truncated", "info", tmp_path)
    block = {"quant_method": "compressed-tensors-sparse", "sparsity_config": {"format": "sparse-9"}}
    (tmp_path / "model.safetensors").write_bytes((two_of_four / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": block}))
    fails("is 'sparse-9'; the formats are dense", "info", tmp_path)
