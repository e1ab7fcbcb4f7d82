import pytest

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.outputs import check_output, new_directory


def test_a_new_directory_appears_whole(tmp_path):
    target = tmp_path / "deep" / "out"
    with new_directory(target, overwrite=False) as directory:
        (directory / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert [entry.name for entry in target.parent.iterdir()] == ["out"]


def test_nothing_is_left_behind_on_failure(tmp_path):
    def write_half():
        with new_directory(tmp_path / "out", overwrite=False) as directory:
            (directory / "a").write_text("1")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_an_old_result_survives_a_failed_overwrite(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("precious")
    with pytest.raises(RuntimeError), new_directory(target, overwrite=True):
        raise RuntimeError
    assert (target / "old").read_text() == "precious"
    with new_directory(target, overwrite=True) as directory:
        (directory / "new").write_text("2")
    assert [entry.name for entry in target.iterdir()] == ["new"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_refuses_a_directory_in_use_and_a_file(tmp_path):
    (tmp_path / "out").mkdir()
    check_output(tmp_path / "out", overwrite=False)
    (tmp_path / "out" / "x").touch()
    with pytest.raises(UsageError, match=r"has 1 entries.*--overwrite"):
        check_output(tmp_path / "out", overwrite=False)
    with pytest.raises(UsageError, match="is a file"):
        check_output(tmp_path / "out" / "x", overwrite=True)


def test_refuses_a_full_disk_before_starting(tmp_path):
    with pytest.raises(UsageError, match=r"needs about 1000000.00 GB and the disk has"):
        check_output(tmp_path / "out", overwrite=False, needed_bytes=10**15)
