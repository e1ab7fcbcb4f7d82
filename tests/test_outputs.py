"""Directories of results: whole or not at all, whatever else happens in their place meanwhile."""

import os
import re
import signal
import stat
from pathlib import Path

import pytest
from result_directories import content, write

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.outputs import check_output, new_directory, scratch_directory, updated_directory


def kept_after(message, context, fill):
    """The place of the result that ``fill`` writes into ``context``, which refuses to put it where it should go."""

    def run():
        with context as directory:
            fill(directory)

    with pytest.raises(UsageError, match=message) as caught:
        run()
    return Path(re.search("the new result is in (.*)", str(caught.value))[1])


def test_a_new_directory_appears_whole(tmp_path):
    target = tmp_path / "deep" / "out"
    with new_directory(target, overwrite=False) as directory:
        (directory / "a").write_text("1")
        assert not target.exists()
    assert content(tmp_path) == {"deep/out/a": "1"}


def test_nothing_is_left_behind_on_failure(tmp_path):
    def write_half():
        with new_directory(tmp_path / "deep" / "out", overwrite=False) as directory:
            (directory / "a").write_text("1")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_an_old_result_survives_a_failed_overwrite(tmp_path):
    target = tmp_path / "out"
    write(target, old="precious")
    with pytest.raises(RuntimeError), new_directory(target, overwrite=True):
        raise RuntimeError
    assert content(tmp_path) == {"out/old": "precious"}
    write(target, overwrite=True, new="2")
    assert content(tmp_path) == {"out/new": "2"}
    assert [entry.name for entry in target.iterdir()] == ["new"]


def test_refuses_a_directory_in_use_and_a_file(tmp_path):
    (tmp_path / "out").mkdir()
    check_output(tmp_path / "out", overwrite=False)
    (tmp_path / "out" / "x").touch()
    with pytest.raises(UsageError, match=r"has 1 entries.*--overwrite"):
        check_output(tmp_path / "out", overwrite=False)
    with pytest.raises(UsageError, match="is a file"):
        check_output(tmp_path / "out" / "x", overwrite=True)


def test_refuses_what_cannot_become_a_directory(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("file/out")
    for path, message in {
        "file/out": "lies under .*file, which isn't a directory",
        "file/deep/out": "lies under .*file, which isn't a directory",
        "dangling": "lies under .*file, which isn't a directory",
        "loop": "leads to itself",
        "n" * 300: "File name too long",
    }.items():
        with pytest.raises(UsageError, match=message) as caught:
            check_output(tmp_path / path, overwrite=True)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_refuses_a_place_without_permission(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(UsageError, match="no permission to write in"):
            check_output(tmp_path / "out", overwrite=False)
    finally:
        tmp_path.chmod(0o755)


def test_refuses_a_full_disk_before_starting(tmp_path):
    with pytest.raises(UsageError, match=r"needs about 1000000.00 GB and the disk has"):
        check_output(tmp_path / "out", overwrite=False, needed_bytes=10**15)


def test_a_disk_that_gets_full_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="No space left on device; free some space"), \
            new_directory(tmp_path / "out", overwrite=False):  # fmt: skip
        Path("/dev/full").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_links_are_followed_also_to_another_disk(tmp_path, other_disk):
    for place in (tmp_path / "real", other_disk / "real"):
        link = tmp_path / f"to-{place.parent.name}"
        link.symlink_to(place)
        write(link, a="1")  # leads nowhere yet
        write(link, overwrite=True, b="2")
        with updated_directory(link) as directory:
            (directory / "c").write_text("3")
        assert link.is_symlink()
        assert content(place) == {"b": "2", "c": "3"}
        assert [each.name for each in place.parent.iterdir() if each.name.startswith(".")] == []


@pytest.fixture
def other_disk(tmp_path):
    import tempfile

    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system at /dev/shm")
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


def test_a_directory_that_exists_is_filled_and_stays_itself(tmp_path):
    """A mount point or a working directory can't be renamed over; owner and permissions are the user's choice."""
    target = tmp_path / "out"
    target.mkdir(mode=0o750)
    number = target.stat().st_ino
    write(target, a="1")
    write(target, overwrite=True, b="2")
    assert content(target) == {"b": "2"}
    assert target.stat().st_ino == number
    assert stat.S_IMODE(target.stat().st_mode) == 0o750


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_writers_the_second_leaves_the_first_result_alone(exists, overwrite, tmp_path):
    target = tmp_path / "out"
    if exists:
        target.mkdir()

    def fill(directory):
        (directory / "a").write_text("second")
        write(target, overwrite=overwrite, a="first")

    kept = kept_after("changed by another program meanwhile", new_directory(target, overwrite=overwrite), fill)
    assert content(tmp_path) == {"out/a": "first", f"{kept.relative_to(tmp_path)}/a": "second"}


def test_overwriting_spares_what_came_meanwhile_however_deep(tmp_path):
    target = tmp_path / "out"
    (target / "sub").mkdir(parents=True)
    (target / "sub" / "old").write_text("old")

    def fill(directory):
        (directory / "a").write_text("mine")
        (target / "sub" / "precious").write_text("theirs")

    kept = kept_after("changed by another program meanwhile", new_directory(target, overwrite=True), fill)
    assert content(target / "sub") == {"old": "old", "precious": "theirs"}
    assert content(kept) == {"a": "mine"}


def test_an_update_replaces_names_and_keeps_the_others(tmp_path):
    target = tmp_path / "out"
    with updated_directory(target) as directory:
        (directory / "model-1.safetensors").write_text("old shard")
        (directory / "model-2.safetensors").write_text("old shard")
        (directory / "sub").mkdir()
        (directory / "sub" / "a").write_text("old")
    (target / "notes").write_text("keep me")
    (target / "sub" / "notes").write_text("keep me")
    with updated_directory(target, stale=["model*.safetensors"]) as directory:
        (directory / "model-1.safetensors").write_text("new")
        (directory / "sub").mkdir()
        (directory / "sub" / "a").write_text("new")
    assert content(tmp_path) == {
        "out/model-1.safetensors": "new", "out/notes": "keep me", "out/sub/a": "new", "out/sub/notes": "keep me",
    }  # fmt: skip


def test_an_update_leaves_alone_what_came_meanwhile(tmp_path):
    target = tmp_path / "out"
    target.mkdir()

    def fill_both(directory):
        (directory / "a").write_text("mine")
        (target / "a").write_text("theirs")

    kept = kept_after("changed by another program meanwhile", updated_directory(target), fill_both)
    assert (target / "a").read_text() == "theirs"
    assert content(kept) == {"a": "mine"}

    def fill_file_and_directory(directory):
        (directory / "sub").write_text("mine")
        (target / "sub").mkdir()

    kept = kept_after("can't be written: .*sub is a directory", updated_directory(target), fill_file_and_directory)
    assert (target / "sub").is_dir()
    assert content(kept) == {"sub": "mine"}


def test_old_files_come_back_when_the_new_ones_cannot_be_moved_in(tmp_path):
    """A file where the update has a directory: found only after the first files have been moved."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "a").write_text("old")
    (target / "z").write_text("a file")

    def fill(directory):
        (directory / "a").write_text("new")
        (directory / "z").mkdir()
        (directory / "z" / "b").write_text("new")

    kept = kept_after("can't be written", updated_directory(target), fill)
    assert {name: (target / name).read_text() for name in ("a", "z")} == {"a": "old", "z": "a file"}
    assert content(kept) == {"a": "new", "z/b": "new"}


def test_permissions_are_those_of_anything_new_in_the_place(tmp_path):
    import torch
    from safetensors.torch import save_file

    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o2775)
    before = os.umask(0o027)
    try:
        write(shared / "out", a="1")
        with updated_directory(shared / "out") as directory:
            # Private to their owner, unless changed.
            save_file({"x": torch.zeros(1)}, directory / "x.safetensors")
            (directory / "script").touch(mode=0o700)
    finally:
        os.umask(before)
    assert stat.S_IMODE((shared / "out" / "x.safetensors").stat().st_mode) == 0o640
    assert stat.S_IMODE((shared / "out" / "script").stat().st_mode) == 0o740
    assert stat.S_IMODE((shared / "out").stat().st_mode) == 0o2750
    assert stat.S_IMODE((shared / "out" / "a").stat().st_mode) == 0o640


def test_scratch_space_is_on_the_disk_of_the_output_and_goes_away(tmp_path, other_disk):
    link = tmp_path / "out"
    link.symlink_to(other_disk / "out")
    with scratch_directory(link) as scratch:
        (scratch / "a").touch()
        assert scratch.parent == other_disk.resolve()
    assert list(other_disk.iterdir()) == []


def test_handlers_of_the_program_stay_its_own(tmp_path):
    received = []
    hangup = signal.getsignal(signal.SIGHUP)
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        with new_directory(tmp_path / "out", overwrite=False):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]
    assert (tmp_path / "out").is_dir()
    assert signal.getsignal(signal.SIGHUP) is hangup
