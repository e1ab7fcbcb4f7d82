"""What a writer and a reader must do: options, sources, targets in place, laziness, memory."""

import pytest
import torch
from checkpoint_files import OTHER_FILES, config_of, files_of
from checkpoint_maker import CONFIG, TARGETS, assert_same, model, two_of_four, write_dense

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import (
    convert_checkpoint,
    load_sparse_checkpoint,
    save_sparse_checkpoint,
)


def test_what_is_copied_and_what_is_not(tmp_path):
    source = write_dense(tmp_path / "source", model())
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("t")
    (source / "old").mkdir()
    for name in ("pytorch_model.bin", "consolidated.safetensors", ".hidden", "old/model.safetensors", "model.gguf"):
        (source / name).write_text("x")
    (source / "linked").symlink_to(source)
    (source / "linked.txt").symlink_to(source / "tokenizer.json")
    written = convert_checkpoint(source, tmp_path / "out", "auto")
    assert files_of(tmp_path / "out").keys() == OTHER_FILES | {
        "config.json",
        "model.safetensors",
        "additional_chat_templates/tool.jinja",
        "linked.txt",
    }
    assert not (tmp_path / "out" / "linked.txt").is_symlink()
    assert written.notes == ()


def test_source_of_other_files(tmp_path):
    source = write_dense(tmp_path / "source", {})
    save_sparse_checkpoint(model(), tmp_path / "out", source=source)
    assert config_of(tmp_path / "out").items() >= CONFIG.items()
    assert files_of(tmp_path / "out").keys() > OTHER_FILES
    with pytest.raises(UsageError, match="isn't a directory"):
        save_sparse_checkpoint(model(), tmp_path / "new", source=tmp_path / "nowhere")


def test_converting_in_place_replaces_what_is_there(tmp_path):
    source = write_dense(tmp_path / "source", model(), shards=3)
    with pytest.raises(UsageError, match="exists and has"):
        convert_checkpoint(source, source, "auto")
    convert_checkpoint(source, source, "auto", overwrite=True)
    assert_same(load_sparse_checkpoint(source), model())
    assert files_of(source).keys() > OTHER_FILES
    inside = write_dense(source / "inside", model())
    with pytest.raises(UsageError, match="holds the source"):
        convert_checkpoint(inside, source, "auto", overwrite=True)
    convert_checkpoint(source, source / "result", "dense")
    assert_same(load_sparse_checkpoint(source / "result"), model())


def test_a_reader_is_saved_without_reading_it_at_once(tmp_path):
    source = write_dense(tmp_path / "source", model())
    reader = load_sparse_checkpoint(source)
    save_sparse_checkpoint(reader, tmp_path / "out", config=reader.config)
    assert_same(load_sparse_checkpoint(tmp_path / "out"), model())


def test_the_mapping_is_lazy(tmp_path):
    save_sparse_checkpoint(model(), tmp_path / "out", config=CONFIG)
    loaded = load_sparse_checkpoint(tmp_path / "out")
    assert len(loaded) == len(model())
    assert loaded.spec(TARGETS[0]).shape == (32, 48)
    for file in loaded.files:
        file.unlink()
    with pytest.raises(UsageError, match="can't be read"):
        loaded[TARGETS[0]]
    with pytest.raises(KeyError):
        loaded["nothing"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "sparse_bitmask"}, "the requested format is 'sparse_bitmask'; the formats are"),
        ({"layout": "old"}, "layout is 'old'; the layouts are sinkprune, legacy"),
        ({"max_shard_bytes": 0}, "max_shard_bytes is 0"),
        ({"targets": "layers.0.weight"}, "targets is the text"),
    ],
)
def test_options_that_mean_nothing_are_refused(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        save_sparse_checkpoint(model(), tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.zeros(2, device="meta")}, "a is on the meta device"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "a is a torch.sparse_coo tensor"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, "a is torch.complex128, which safetensors can't hold"),
        ({"a\n": torch.zeros(2)}, "can't be the name of a tensor"),
        ([("a", torch.zeros(2)), ("a", torch.zeros(2))], "two tensors are named a"),
        (iter([("a", torch.zeros(2)), ("a", torch.zeros(2))]), "two tensors are named a"),
        (
            {"layers.0.a.weight": two_of_four(8, 8), "layers.0.a.shape": torch.zeros(2)},
            "layers.0.a.shape would read as",
        ),
    ],
)
def test_tensors_that_cannot_be_saved(tmp_path, tensors, message):
    with pytest.raises(UsageError, match=message):
        save_sparse_checkpoint(tensors, tmp_path / "out")
    assert not list(tmp_path.iterdir())
