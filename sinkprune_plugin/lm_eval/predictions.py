"""Predictions for Mobile-MMLU's evaluation portal, from the samples that lm-eval logged.

The public data sets hold no answer key; the portal takes a file of ``question_id,predicted_answer``. Run as
``python -m sinkprune_plugin.lm_eval.predictions SAMPLES.jsonl PREDICTIONS.csv``.
"""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.lm_eval.rotations import LETTERS, averaged_choice
from sinkprune_plugin.text_windows import read_text

__all__ = ["main", "write_predictions"]


def write_predictions(samples: Path, predictions: Path) -> int:
    """Average each question over its rotations.

    :param samples: file that ``lm_eval --log_samples`` wrote for one of the Mobile-MMLU tasks
    :param predictions: .csv file to write; it must not exist
    :return: number of questions
    :raises UsageError: if the samples can't be read or the file exists
    """
    if predictions.exists():
        raise UsageError(f"{predictions} exists; remove it or name another file")
    if not samples.is_file():
        raise UsageError(f"{samples} does not exist; run lm_eval with --log_samples and --output_path")
    questions: dict[str, list[tuple[int, Sequence[float]]]] = {}
    for number, line in enumerate(read_text(samples).rstrip("\n").split("\n"), start=1):
        try:
            sample = json.loads(line)
            scores = [float(score) for score, _ in sample["filtered_resps"]]
            rotation = (int(sample["doc"]["rotation"]), scores)
            questions.setdefault(str(sample["doc"]["question_id"]), []).append(rotation)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"{samples} line {number} is no sample of a Mobile-MMLU task; log them again") from error
    rows = [(question, LETTERS[averaged_choice(seen)]) for question, seen in questions.items()]
    try:
        with predictions.open("x", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows([("question_id", "predicted_answer"), *rows])
    except OSError as error:
        raise UsageError(f"{predictions} can't be written: {error.strerror}; choose another place") from error
    return len(questions)


def main(arguments: Sequence[str]) -> int:
    """The command.

    :param arguments: samples and predictions
    :return: exit status
    """
    try:
        if len(arguments) != 2:
            raise UsageError("give two files: the samples of lm_eval, and the .csv to write")
        written = write_predictions(Path(arguments[0]), Path(arguments[1]))
    except UsageError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{written} questions\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
