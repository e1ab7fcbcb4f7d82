"""Mobile-MMLU in every rotation of the options: accuracy and predictions that the order can't change."""

import csv
import math

import pytest
from rotation_cases import ROWS, docs, likes, samples_file

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.lm_eval import rotations
from sinkprune_plugin.lm_eval.predictions import write_predictions

KEY = {"answer": ["C", " a "]}


def test_every_option_stands_in_every_place():
    rotated = docs(ROWS | KEY)
    assert len(rotated) == 8
    for number, right in enumerate(("c", "1")):
        mine = rotated[4 * number : 4 * number + 4]
        assert [doc["options"][doc["gold"]] for doc in mine] == [right] * 4
        assert sorted(doc["gold"] for doc in mine) == [0, 1, 2, 3]
        assert [doc["rotation"] for doc in mine] == [0, 1, 2, 3]
    assert [doc["question_id"] for doc in rotated] == ["q7"] * 4 + ["q9"] * 4
    assert rotations.doc_to_text(rotated[1]) == "What?\nA. b\nB. c\nC. d\nD. a\nAnswer:"
    assert rotations.doc_to_choice(rotated[1]) == ["A", "B", "C", "D"]


def test_columns_of_numbers_are_taken_as_text():
    from datasets import Dataset

    data = Dataset.from_dict({name: column[1:] for name, column in ROWS.items()})
    assert next(iter(rotations.process_docs(data)))["options"] == ["1", "2", "3", "4"]


def test_a_model_that_always_says_a_is_right_once_in_four():
    always_a = [(0.0, False), (-1.0, False), (-2.0, False), (-3.0, False)]
    assert math.fsum(rotations.process_results(doc, always_a)["acc"] for doc in docs(ROWS | KEY)[:4]) == 1


def test_the_average_over_rotations_hides_a_preference_for_a_place():
    rotated = docs(ROWS | KEY)
    items = [
        rotations.process_results(doc, likes(doc, "c" if doc["question_id"] == "q7" else "2", 5.0)) for doc in rotated
    ]
    # A place that is preferred over any answer: the right answer is chosen only if it is there.
    assert math.fsum(item["acc"] for item in items) == 2
    # The average finds the preferred option: right for the first question, wrong for the second.
    assert rotations.averaged_accuracy(item["acc_averaged"] for item in items) == 0.5


def test_without_a_key_there_is_no_score():
    doc = docs(ROWS)[0]
    assert doc["gold"] == -1
    assert rotations.process_results(doc, likes(doc, "a")) == {}


def test_predictions_name_the_option_in_its_original_place(tmp_path):
    samples = samples_file(tmp_path / "samples.jsonl", docs(ROWS), {"q7": "d", "q9": "2"})
    assert write_predictions(samples, tmp_path / "predictions.csv") == 2
    with (tmp_path / "predictions.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert sorted((row["question_id"], row["predicted_answer"]) for row in rows) == [("q7", "D"), ("q9", "B")]
    with pytest.raises(UsageError, match="exists; remove it"):
        write_predictions(samples, tmp_path / "predictions.csv")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"Frage": ["?"]}, "has no column 'question', only Frage"),
        ({name: column for name, column in ROWS.items() if name != "C"}, "has no column 'C'"),
        (ROWS | {"answer": ["C", "E"]}, "the answer of row 1 is 'E'; write A, B, C or D"),
        (ROWS | {"answer": ["AB", "A"]}, "the answer of row 0 is 'AB'"),
        (ROWS | {"answer": ["", "A"]}, "the answer of row 0 is ''"),
    ],
)
def test_wrong_data_is_refused(columns, message):
    with pytest.raises(UsageError, match=message):
        docs(columns)


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"neither \.csv nor \.jsonl"):
        rotations.load("unused", mobile_mmlu_file="key.xlsx")
    with pytest.raises(UsageError, match="does not exist; run lm_eval with --log_samples"):
        write_predictions(tmp_path / "none.jsonl", tmp_path / "out.csv")
    (tmp_path / "other.jsonl").write_text('{"doc": {}}\n')
    with pytest.raises(UsageError, match=r"line 1 is no sample of a Mobile-MMLU task"):
        write_predictions(tmp_path / "other.jsonl", tmp_path / "out.csv")
    for content, message in ((b"\xff\n", "is not UTF-8 text"), (b"[" * 100_000, "line 1 is no sample")):
        (tmp_path / "bad.jsonl").write_bytes(content)
        with pytest.raises(UsageError, match=message):
            write_predictions(tmp_path / "bad.jsonl", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()
    samples = samples_file(tmp_path / "samples.jsonl", docs(ROWS), {"q7": "d", "q9": "2"})
    with pytest.raises(UsageError, match=r"out\.csv can't be written: No such file or directory"):
        write_predictions(samples, tmp_path / "missing" / "out.csv")
