import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.inputs import text_windows
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_config, load_tokenizer
from sinkprune_plugin.text_windows import embedded_text, read_documents, token_windows

EOS = 0


class Characters:
    """Tokenizer with one token per character, so that windows can be read back."""

    eos_token_id: int | None = EOS

    def __call__(self, text, *, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [ord(character) for character in text]}


def joined(documents):
    return "\0".join(documents)


def text_of(windows):
    return ["".join(map(chr, window)) for window in windows.tolist()]


@given(st.lists(st.text("abcdef ", min_size=1, max_size=40), min_size=1, max_size=6), st.integers(8, 12))
@settings(deadline=None, max_examples=80)
def test_windows_tile_the_stream_in_order(documents, seq_len):
    stream = joined(documents)
    available = len(stream) // seq_len
    if available == 0:
        with pytest.raises(UsageError, match=f"has {len(stream)} tokens, enough for 0 windows of {seq_len}, but 1"):
            token_windows(documents, Characters(), seq_len, 1, seed=None)
        return
    windows = token_windows(documents, Characters(), seq_len, available, seed=None)
    assert windows.shape == (available, seq_len)
    assert windows.dtype == torch.int64
    assert "".join(text_of(windows)) == stream[: available * seq_len]
    chosen = token_windows(documents, Characters(), seq_len, available, seed=3)
    assert sorted(text_of(chosen)) == sorted(text_of(windows)), "a seeded choice of all windows is a permutation"


def test_who_names_no_text_is_told_which_one_is_too_short(tmp_path):
    """What the defaults of `sinkprune prune` meet on a published model: 128 windows of 4096 tokens."""
    config, tokenizer = load_config(EMBEDDED_MODEL), load_tokenizer(EMBEDDED_MODEL)
    config.max_sequence_length = 4096
    with pytest.raises(UsageError, match=r"but 128 were asked for; use a longer text than the .* own \(--dataset\)"):
        text_windows(config, tokenizer, None, "calibration", 4096, 128, 0)
    own = tmp_path / "own.txt"
    own.write_text("We the people. " * 100)
    with pytest.raises(UsageError, match="but 128 were asked for; use more text, fewer windows"):
        text_windows(config, tokenizer, str(own), "calibration", 4096, 128, 0)


def test_a_seed_chooses_the_same_windows_and_more_of_them_begin_alike():
    documents = ["".join(chr(97 + (index * 7 + index // 26) % 26) for index in range(4000))]
    pool = text_of(token_windows(documents, Characters(), 10, 400, seed=None))
    first = text_of(token_windows(documents, Characters(), 10, 20, seed=0))
    assert first == text_of(token_windows(documents, Characters(), 10, 20, seed=0))
    assert first != text_of(token_windows(documents, Characters(), 10, 20, seed=1))
    assert first != pool[:20]
    assert set(first) <= set(pool)
    # More windows of the same seed begin with the same ones, so results at 16 and 128 samples share data.
    assert text_of(token_windows(documents, Characters(), 10, 30, seed=0))[:20] == first


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    token_windows(["abcdefgh" * 10], Characters(), 8, 4)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_an_eos_documents_just_follow_each_other():
    tokenizer = Characters()
    tokenizer.eos_token_id = None
    assert text_of(token_windows(["abcd", "efgh"], tokenizer, 8, 1)) == ["abcdefgh"]


def test_in_order_stops_reading_when_it_has_enough():
    def documents():
        yield "abcdefgh"
        yield "ijklmnop"
        raise AssertionError("read on after the last window was full")

    windows = token_windows(documents(), Characters(), 8, 2, seed=None)
    assert text_of(windows) == ["abcdefgh", "\0ijklmno"]


@pytest.mark.parametrize(
    ("seq_len", "num_windows", "message"),
    [
        (7, 1, "seq_len is 7; windows need at least 8"),
        (8, 0, "num_windows is 0"),
        (8, 11, "enough for 10 windows of 8"),
    ],
)
def test_windows_that_the_text_cannot_fill_are_refused(seq_len, num_windows, message):
    with pytest.raises(UsageError, match=message):
        token_windows(["a" * 80], Characters(), seq_len, num_windows)


def test_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n", encoding="utf-8")
    assert read_documents(path) == ["one\n\ntwo\n"]


def test_jsonl_gives_one_document_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    # U+2028 separates lines for str.splitlines, but not in JSON lines.
    lines = [{"text": "one\u2028more", "body": "x"}, {"text": "  "}, {"text": "two"}]
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n", encoding="utf-8")
    assert read_documents(path) == ["one\u2028more", "two"]
    path.write_text('{"body": "x"}\n', encoding="utf-8")
    assert read_documents(path, "body") == ["x"]


def test_a_saved_dataset_gives_one_document_per_row(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"text": ["one", None, "two"], "body": ["x", "y", "z"]})
    rows.save_to_disk(tmp_path / "rows")
    assert read_documents(tmp_path / "rows") == ["one", "two"]
    assert read_documents(str(tmp_path / "rows"), "body") == ["x", "y", "z"]
    DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "splits")
    assert read_documents(tmp_path / "splits") == ["one", "two"]
    DatasetDict({"a": rows, "b": rows}).save_to_disk(tmp_path / "no_train")
    with pytest.raises(UsageError, match="splits a, b and no 'train'"):
        read_documents(tmp_path / "no_train")
    with pytest.raises(UsageError, match="no column 'content', only text, body"):
        read_documents(tmp_path / "rows", "content")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.md", b"text", "neither .txt nor .jsonl"),
        ("a.txt", b" \n", "holds no text"),
        ("a.txt", b"caf\xe9", r"not UTF-8 text \(byte 3\)"),
        ("a.jsonl", b'{"text": "x"}\n{oops\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1 has no text in field 'text'"),
        ("a.jsonl", b'"x"\n', "line 1 has no text in field 'text'"),
        ("a.jsonl", b"\n", "holds no text"),
    ],
)
def test_unreadable_sources(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_documents(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_source_and_plain_directory(tmp_path):
    with pytest.raises(UsageError, match=r"nothing\.txt does not exist"):
        read_documents(tmp_path / "nothing.txt")
    with pytest.raises(UsageError, match="no dataset written by save_to_disk"):
        read_documents(tmp_path)


def test_embedded_texts_are_different_speeches():
    years = {}
    for kind in ("calibration", "test"):
        path = embedded_text(kind)
        records = [json.loads(line) for line in path.open(encoding="utf-8")]
        years[kind] = {record["year"] for record in records}
        assert read_documents(path) == [record["text"] for record in records]
        assert 100_000 < path.stat().st_size < 300_000
        assert max(years[kind]) - min(years[kind]) > 190, "spread over two centuries"
    assert not years["calibration"] & years["test"]
    with pytest.raises(UsageError, match="no embedded text 'train'"):
        embedded_text("train")


def test_embedded_text_yields_enough_windows_and_no_warning(recwarn, capfd):
    from transformers import PreTrainedTokenizerFast

    file = Path(embedded_text("test")).parent / "tiny-llada" / "tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>", model_max_length=256)
    assert tokenizer.eos_token_id == 1
    # What the demo and the recipes' defaults ask for: 128 samples of the model's full 256 positions.
    assert token_windows(read_documents(embedded_text("calibration")), tokenizer, 256, 128).shape == (128, 256)
    assert token_windows(read_documents(embedded_text("test")), tokenizer, 256, 128).shape == (128, 256)
    assert "longer than" not in capfd.readouterr().err
