"""The database of a search: what it holds, what it refuses, what an interruption leaves."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from sinkprune_plugin import outputs
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers import level_database
from sinkprune_plugin.modifiers.level_database import LevelDatabase, weight_bytes


def pruned(sparsities, dtype=torch.bfloat16, shape=(40, 96)):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(shape, generator=generator)
    order = W.abs().flatten().argsort()
    levels = []
    for sparsity in sparsities:
        level = W.clone()
        level.view(-1)[order[: round(W.numel() * sparsity)]] = 0
        levels.append(level.to(dtype))
    return levels


def opened(directory, **numbers):
    return LevelDatabase(directory, "this", **({"needed_bytes": 0, "dense_bytes": 0} | numbers))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_weights_and_errors_are_read_as_they_were_written(dtype, cache_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(level_database, "CACHE_BYTES", cache_bytes)
    levels = pruned([0.9, 0.75, 0.5], dtype)
    database = opened(tmp_path / "db", dense_bytes=1)
    assert not database.has("a.b")
    database.write("a.b", levels, [0.3, 0.1 + 0.2, 1e-9], 1e30 / 3)
    again = opened(tmp_path / "db", dense_bytes=1)
    assert again.has("a.b")
    assert again.errors("a.b") == ([0.3, 0.1 + 0.2, 1e-9], 1e30 / 3)
    for level, weight in enumerate(levels):
        assert torch.equal(again.read("a.b", level), weight)
    # Small models stay in memory, larger ones are read every time.
    assert (again.read("a.b", 1) is again.read("a.b", 1)) == (cache_bytes > 0)


def test_files_take_the_bytes_that_were_computed(tmp_path):
    sparsities = [0.875, 0.75, 0.5]
    levels = pruned(sparsities, shape=(256, 500))
    opened(tmp_path / "db").write("a", levels, [0.0] * 3, 1.0)
    computed = sum(weight_bytes(levels[0], sparsity) for sparsity in sparsities)
    size = (tmp_path / "db" / "a.safetensors").stat().st_size
    # Shapes and the file's header are not counted.
    assert computed < size < computed + 2000


def test_the_state_is_kept_and_belongs_to_one_search(tmp_path):
    database = opened(tmp_path / "db")
    assert database.read_state() is None
    database.write_state(None)
    assert database.read_state() is None
    database.write_state({"rounds": 3})
    assert opened(tmp_path / "db").read_state() == {"rounds": 3}
    with pytest.raises(UsageError, match="db belongs to another search"):
        LevelDatabase(tmp_path / "db", "other", needed_bytes=0, dense_bytes=0)


def test_an_interrupted_write_leaves_no_file(tmp_path, monkeypatch):
    database = opened(tmp_path / "db")

    def interrupted(parts, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(level_database, "save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            database.write("a", pruned([0.5]), [0.0], 1.0)
    assert not database.has("a")
    database.write("a", pruned([0.5]), [0.0], 1.0)
    assert [file.name for file in (tmp_path / "db").iterdir()] == ["a.safetensors"]


def test_a_disk_without_room_is_refused_but_for_what_is_there(tmp_path, monkeypatch):
    database = opened(tmp_path / "db")
    database.write("a", pruned([0.5]), [0.0], 1.0)
    there = (tmp_path / "db" / "a.safetensors").stat().st_size
    usage = SimpleNamespace(disk_usage=lambda _place: SimpleNamespace(free=1000))
    monkeypatch.setattr(outputs, "shutil", SimpleNamespace(**{**vars(shutil), **vars(usage)}))
    opened(tmp_path / "db", needed_bytes=there + 1000)
    with pytest.raises(UsageError, match=r"db needs about 0\.00 GB and the disk has 0\.00 GB free"):
        opened(tmp_path / "db", needed_bytes=there + 1001)


@pytest.mark.parametrize("content", ["{", "[]", '{"problem": "this", "search": 3}'])
def test_a_damaged_state_is_refused(content, tmp_path):
    (tmp_path / "search.json").write_text(content)
    with pytest.raises(UsageError, match=r"search\.json .*start again"):
        opened(tmp_path)


def test_a_damaged_or_missing_weight_is_refused(tmp_path):
    database = opened(tmp_path / "db")
    database.write("a", pruned([0.5]), [0.0], 1.0)
    file = tmp_path / "db" / "a.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UsageError, match=r"a\.safetensors can't be read"):
        database.read("a", 0)
    file.unlink()
    with pytest.raises(UsageError, match=r"a\.safetensors can't be read"):
        database.errors("a")
