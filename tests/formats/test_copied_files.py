"""What is copied when a checkpoint is converted: its regular files, and no other file of the machine."""

import os
import socket

import pytest
from checkpoint_maker import model, write_dense

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import convert_checkpoint, save_sparse_checkpoint

GENERATION = "generation_config.json"


def converted(source, tmp_path):
    written = convert_checkpoint(source, tmp_path / "out", "dense")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    return {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}, written


@pytest.fixture
def source(tmp_path):
    return write_dense(tmp_path / "home" / "source", model())


@pytest.mark.parametrize("target", ["/etc/passwd", "../secret", "../../home/secret", "/dev/zero", "sub/../../secret"])
@pytest.mark.parametrize("place", ["notes.txt", "sub/notes.txt"])
def test_a_link_out_of_the_checkpoint_is_refused(source, tmp_path, target, place):
    (tmp_path / "home" / "secret").write_text("secret")
    (source / "sub").mkdir()
    if not target.startswith("/") and place.startswith("sub"):
        target = f"../{target}"
    (source / place).symlink_to(target)
    message = r"notes\.txt is a link out of the checkpoint, to .*; put the file in its place or remove the link"
    with pytest.raises(UsageError, match=message):
        convert_checkpoint(source, tmp_path / "out", "dense")
    with pytest.raises(UsageError, match=message):
        save_sparse_checkpoint(model(), tmp_path / "out", source=source)
    assert not (tmp_path / "out").exists()


def test_a_chain_of_links_is_followed_to_its_end(source, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (source / "a.txt").symlink_to("b.txt")
    (source / "b.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UsageError, match=r"a\.txt is a link out of the checkpoint"):
        convert_checkpoint(source, tmp_path / "out", "dense")


@pytest.mark.parametrize("target", ["nowhere", "notes.txt"])
def test_a_link_to_nothing_is_refused(source, tmp_path, target):
    (source / "notes.txt").symlink_to(target)
    with pytest.raises(UsageError, match=r"notes\.txt is a link that leads nowhere"):
        convert_checkpoint(source, tmp_path / "out", "dense")


def test_links_within_the_checkpoint_are_copied_as_files(source, tmp_path):
    (source / "sub").mkdir()
    (source / "sub" / "notes.txt").symlink_to(f"../{GENERATION}")
    # The checkpoint may be reached by a link itself.
    (tmp_path / "link").symlink_to(source)
    found, _ = converted(tmp_path / "link", tmp_path)
    assert (tmp_path / "out" / "sub" / "notes.txt").read_bytes() == (source / GENERATION).read_bytes()
    assert "sub/notes.txt" in found


def test_a_hub_cache_is_copied_from_its_store(tmp_path):
    """As huggingface_hub arranges it: snapshots/REVISION holds links into blobs."""
    repository = tmp_path / "hub" / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    snapshot = write_dense(repository / "snapshots" / "0123abc", model())
    (snapshot / "sub").mkdir()
    (snapshot / "sub" / "tool.jinja").write_text("t")
    for number, file in enumerate(path for path in sorted(snapshot.rglob("*")) if path.is_file()):
        blob = repository / "blobs" / f"{number:040}"
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, file.parent))
    expected = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*")}
    found, _ = converted(snapshot, tmp_path)
    assert found == expected
    (tmp_path / "secret").write_text("secret")
    (snapshot / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UsageError, match=r"notes\.txt is a link out of the checkpoint"):
        convert_checkpoint(snapshot, tmp_path / "other", "dense")


def test_another_models_store_is_out_of_the_checkpoint(tmp_path):
    for name in ("models--a--b", "models--a--c"):
        (tmp_path / name / "blobs").mkdir(parents=True)
        (tmp_path / name / "blobs" / "0").write_text("x")
    snapshot = write_dense(tmp_path / "models--a--b" / "snapshots" / "0", model())
    (snapshot / "notes.txt").symlink_to("../../../models--a--c/blobs/0")
    with pytest.raises(UsageError, match="is a link out of the checkpoint"):
        convert_checkpoint(snapshot, tmp_path / "out", "dense")


def test_only_regular_files_are_copied(source, tmp_path, monkeypatch):
    before, _ = converted(source, tmp_path / "a")
    os.mkfifo(source / "pipe")
    monkeypatch.chdir(source)  # a socket's path has at most 108 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        (source / "to-pipe").symlink_to("pipe")
        (source / "empty").mkdir()
        assert converted(source, tmp_path / "b")[0] == before


def test_a_large_file_is_left_out_and_said_so(source, tmp_path):
    before, _ = converted(source, tmp_path / "a")
    with (source / "onnx_data").open("wb") as stream:
        stream.truncate(1 << 40)
    found, written = converted(source, tmp_path / "b")
    assert found == before
    assert written.notes == ("onnx_data has 1099512 MB, over the 256 MB of a file that is copied along; left out",)
