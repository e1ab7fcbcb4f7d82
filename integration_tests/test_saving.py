"""What oneshot(output_dir=…) and save_pretrained write for each save_format, alone and with quantization stacked."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import convert_checkpoint, load_sparse_checkpoint
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model
from sinkprune_plugin.modifiers.oneshot_flow import calibration_dataset, run_oneshot
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier

QUICK = {"sparsity": 0.5, "diffusion_steps": 4, "sample_interval": 2}
HEAD = r"re:.*transformer\.ff_out$"
# 6 blocks of 4 × 192 × 192 and 3 × 192 × 512 weights.
BLOCK_WEIGHTS = 2_654_208


@pytest.fixture
def windows(golden_windows):
    return golden_windows[:2, :64]


def wanda(structure="0:0", **fields):
    return SinkAwareWandaModifier(mask_structure=structure, **QUICK, **fields)


def quantizer(scheme):
    return QuantizationModifier(targets=["Linear"], scheme=scheme, ignore=[HEAD])


def same_state(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name].to(tensor.dtype)), name


@pytest.mark.parametrize(
    ("structure", "save_format", "written"),
    [
        ("0:0", "auto", "sparse-bitmask"),
        ("2:4", "auto", "sparse-24-bitmask"),
        ("4:8", "auto", "sparse-bitmask"),
        ("0:0", "dense", "dense"),
        ("2:4", "dense", "dense"),
        ("0:0", "sparse-bitmask", "sparse-bitmask"),
        ("2:4", "sparse-bitmask", "sparse-bitmask"),
        ("2:4", "sparse-24-bitmask", "sparse-24-bitmask"),
    ],
)
def test_each_save_format_reloads_bit_for_bit(structure, save_format, written, model, tokenizer, windows, tmp_path):
    run_oneshot(model, tokenizer, wanda(structure, save_format=save_format), windows)
    saved = tmp_path / "saved"
    model.save_pretrained(str(saved))
    reader = load_sparse_checkpoint(saved)
    assert reader.format == written
    assert len(reader.sparse_names) == (0 if written == "dense" else 42)
    if written == "dense":
        check_stock_readers_take(saved)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    same_state(model, AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32))


def test_output_dir_and_save_pretrained_write_the_same(tokenizer, windows, tmp_path):
    model = oneshot(
        model=str(EMBEDDED_MODEL),
        tokenizer=tokenizer,
        dataset=calibration_dataset(windows),
        recipe=[wanda("2:4")],
        num_calibration_samples=2,
        max_seq_length=64,
        output_dir=str(tmp_path / "out"),
    )
    model.save_pretrained(str(tmp_path / "saved"))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "saved"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "recipe.yaml", "tokenizer.json"} <= names


def test_sizes_on_disk(tokenizer, windows, tmp_path):
    """bfloat16: 2:4 takes 9/16 of dense and 16 bytes per matrix; 50 % unstructured the same and 8 bytes per row."""
    sizes = {}
    for name, modifier in {
        "dense": wanda(save_format="dense"),
        "bitmask": wanda(),
        "24": wanda("2:4"),
    }.items():
        model = load_model(EMBEDDED_MODEL, torch.bfloat16)
        run_oneshot(model, tokenizer, modifier, windows)
        model.save_pretrained(str(tmp_path / name))
        reader = load_sparse_checkpoint(tmp_path / name)
        targets = [key for key in reader if ".blocks." in key and reader[key].dim() == 2]
        assert sum(reader[key].numel() for key in targets) == BLOCK_WEIGHTS
        sizes[name] = sum(reader.stored(key).nbytes for key in targets)
    assert sizes["dense"] == 2 * BLOCK_WEIGHTS
    assert sizes["24"] == 2 * BLOCK_WEIGHTS * 9 // 16 + 42 * 16
    # Blocks have 4 × 192 + 2 × 512 + 192 rows; the half of each row's weights that is kept is a whole number.
    assert sizes["bitmask"] == sizes["24"] + 8 * 6 * (4 * 192 + 2 * 512 + 192)


@pytest.mark.parametrize(
    ("structure", "scheme", "save_format", "written", "quantized"),
    [
        ("2:4", "FP8_DYNAMIC", "auto", "sparse-24-bitmask", torch.float8_e4m3fn),
        ("2:4", "FP8_DYNAMIC", "sparse-24-bitmask", "sparse-24-bitmask", torch.float8_e4m3fn),
        ("2:4", "W8A8", "auto", "sparse-24-bitmask", torch.int8),
        ("2:4", "FP8_DYNAMIC", "dense", "dense", torch.float8_e4m3fn),
        ("0:0", "FP8_DYNAMIC", "auto", "dense", torch.float8_e4m3fn),
        ("0:0", "W8A8", "auto", "dense", torch.int8),
    ],
)
def test_with_a_quantizer_stacked(
    structure, scheme, save_format, written, quantized, model, tokenizer, windows, tmp_path, caplog_loguru
):
    run_oneshot(model, tokenizer, [wanda(structure, save_format=save_format), quantizer(scheme)], windows)
    saved = tmp_path / "saved"
    model.save_pretrained(str(saved))
    reader = load_sparse_checkpoint(saved)
    assert reader.format == written
    weight = reader["model.transformer.blocks.2.up_proj.weight"]
    assert weight.dtype == quantized
    assert float((weight.float() == 0).float().mean()) >= 0.5
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    # The quantizer's own description stays as it was.
    assert config["config_groups"]["group_0"]["weights"]["num_bits"] == 8
    assert config["format"] == {torch.int8: "int-quantized", torch.float8_e4m3fn: "float-quantized"}[quantized]
    assert config["quant_method"] == ("compressed-tensors" if written == "dense" else "compressed-tensors-sparse")
    if written == "dense":
        check_stock_readers_take(saved)
    else:
        check_stock_readers_take(convert_checkpoint(saved, tmp_path / "converted", "dense", progress=False).directory)
    if written == "dense" and save_format == "auto":
        assert any("stored dense" in line and "2:4" in line for line in caplog_loguru)
    ids = windows[:1]
    loaded = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    with torch.no_grad():
        expected, found = model(input_ids=ids).logits, loaded(input_ids=ids).logits
    # The same int8/fp8 weights and scales; only the order of scaling and rounding activations may differ.
    assert float((expected - found).abs().max()) <= 0.02 * float(expected.abs().max())


def check_stock_readers_take(saved):
    """vLLM since 0.19 and transformers on its own refuse or mistake a checkpoint with a ``sparsity_config``."""
    config = json.loads((saved / "config.json").read_text())
    assert "compression_config" not in config
    assert "sparsity_config" not in config
    assert not config.get("quantization_config", {}).get("sparsity_config")


@pytest.fixture
def caplog_loguru():
    from loguru import logger

    lines = []
    handler = logger.add(lines.append, format="{message}", level="INFO")
    yield lines
    logger.remove(handler)


def test_a_format_named_by_the_user_counts_for_quantized_weights_too(model, tokenizer, windows, tmp_path):
    run_oneshot(model, tokenizer, [wanda(save_format="sparse-bitmask"), quantizer("FP8_DYNAMIC")], windows)
    model.save_pretrained(str(tmp_path))
    reader = load_sparse_checkpoint(tmp_path)
    assert reader.format == "sparse-bitmask"
    dense = tmp_path / "dense"
    model.save_pretrained(str(dense), save_compressed=False)
    plain = load_file(dense / "model.safetensors")
    assert reader.keys() == plain.keys()
    for name, tensor in plain.items():
        # fp8 -0.0 is a zero and comes back as +0.0; torch compares fp8 through wider types.
        assert torch.equal(reader[name].float(), tensor.float()), name


def test_a_model_loaded_from_a_sparse_checkpoint_is_pruned_and_saved_again(model, tokenizer, windows, tmp_path):
    run_oneshot(model, tokenizer, wanda(), windows)
    model.save_pretrained(str(tmp_path / "first"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=torch.float32)
    again.save_pretrained(str(tmp_path / "resaved"))
    same_state(model, AutoModelForCausalLM.from_pretrained(tmp_path / "resaved", dtype=torch.float32))
    run_oneshot(again, tokenizer, wanda("2:4"), windows)
    again.save_pretrained(str(tmp_path / "second"))
    reader = load_sparse_checkpoint(tmp_path / "second")
    assert reader.format == "sparse-24-bitmask"
    same_state(again, AutoModelForCausalLM.from_pretrained(tmp_path / "second", dtype=torch.float32))
    # llm-compressor saves with the config.json of the source, whose sparsity is no longer valid.
    again.save_pretrained(str(tmp_path / "dense"), save_compressed=False)
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    same_state(again, AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32))


def test_saving_again_replaces_the_weights_of_another_format(model, tokenizer, windows, tmp_path):
    """A directory that held shards must not be left with two sets of weights."""
    model.save_pretrained(str(tmp_path), max_shard_size="2MB")
    (tmp_path / "notes.txt").write_text("keep me")
    (tmp_path / "model_of_mine.safetensors").write_text("keep me")
    assert (tmp_path / "model.safetensors.index.json").exists()
    run_oneshot(model, tokenizer, wanda(), windows)
    model.save_pretrained(str(tmp_path))
    kept = sorted(path.name for path in tmp_path.glob("*.safetensors*"))
    assert kept == ["model.safetensors", "model_of_mine.safetensors"]
    assert (tmp_path / "notes.txt").read_text() == "keep me"
    assert (tmp_path / "model_of_mine.safetensors").read_text() == "keep me"
    same_state(model, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))


def test_save_compressed_false_writes_dense_weights(model, tokenizer, windows, tmp_path):
    run_oneshot(model, tokenizer, wanda(), windows)
    model.save_pretrained(str(tmp_path), save_compressed=False)
    assert load_sparse_checkpoint(tmp_path).format == "dense"


def test_shards_stay_shards(model, tokenizer, windows, tmp_path):
    run_oneshot(model, tokenizer, wanda(), windows)
    model.save_pretrained(str(tmp_path), max_shard_size="3MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert load_sparse_checkpoint(tmp_path).format == "sparse-bitmask"
    same_state(model, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))


def test_a_failed_save_leaves_what_was_there(model, tokenizer, windows, tmp_path, monkeypatch):
    run_oneshot(model, tokenizer, wanda(), windows)
    saved = tmp_path / "saved"
    model.save_pretrained(str(saved))
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    from sinkprune_plugin.formats import checkpoint_writer

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_writer, "ShardWriter", full, raising=True)
    with pytest.raises((UsageError, OSError), match="space"):
        model.save_pretrained(str(saved))
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_saving_to_a_link_on_another_disk(model, tokenizer, windows, tmp_path):
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system at /dev/shm")
    run_oneshot(model, tokenizer, wanda(), windows)
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        (tmp_path / "saved").symlink_to(folder)
        model.save_pretrained(str(tmp_path / "saved"))
        assert (tmp_path / "saved").is_symlink()
        assert not any(path.name.startswith(".") for path in Path(folder).iterdir())
        same_state(model, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def test_pushing_to_a_hub_while_saving_is_refused(model, tokenizer, windows, tmp_path):
    run_oneshot(model, tokenizer, wanda(), windows)
    with pytest.raises(UsageError, match="pushed to a hub"):
        model.save_pretrained(str(tmp_path / "saved"), push_to_hub=True)
    assert not (tmp_path / "saved").exists()
