"""Multiple choice that doesn't depend on the order of the options: each question in every rotation of its options.

For lm-evaluation-harness: the task configurations in ``tasks/`` name these functions. ``acc`` is the mean accuracy over
rotations. ``acc_averaged`` is that of one answer per question, the option whose probability, averaged over rotations,
is the largest: it doesn't depend on the order at all.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from sinkprune_plugin.errors import UsageError

__all__ = [
    "LETTERS",
    "averaged_accuracy",
    "averaged_choice",
    "doc_to_choice",
    "doc_to_text",
    "load",
    "process_docs",
    "process_results",
]

LETTERS = "ABCD"
# Where there is no answer key; lm-eval wants the target to be an index.
UNKNOWN = -1


def load(hub_dataset: str, hub_config: str | None = None, mobile_mmlu_file: str | None = None, **_: Any) -> Any:
    """Load the questions; ``custom_dataset`` of the task configurations.

    :param hub_dataset: name on the hub
    :param hub_config: its configuration
    :param mobile_mmlu_file: a .csv or .jsonl file with the same columns and ``answer``, in place of the hub's data;
        from ``--metadata``
    :return: a ``DatasetDict`` with the split ``test``
    :raises UsageError: if the file is of another kind
    """
    from datasets import DatasetDict, load_dataset

    if mobile_mmlu_file is None:
        data = load_dataset(hub_dataset, hub_config)
        # datasets calls one file without a split in its name "train".
        return DatasetDict(test=data["test"] if "test" in data else next(iter(data.values())))
    kinds = {".csv": "csv", ".jsonl": "json"}
    ending = mobile_mmlu_file[mobile_mmlu_file.rfind(".") :]
    if ending not in kinds:
        raise UsageError(f"mobile_mmlu_file {mobile_mmlu_file} is neither .csv nor .jsonl; convert it to one of them")
    return DatasetDict(test=load_dataset(kinds[ending], data_files=mobile_mmlu_file, split="train"))


def process_docs(dataset: Any) -> Any:
    """Each question in each rotation of its options.

    :param dataset: rows with ``question`` (or ``Question``), ``A`` … ``D``, perhaps ``question_id``, and ``answer`` (a
        letter) where the key is known
    :return: four rows for each, with ``question_id``, ``question``, ``options``, ``rotation`` and ``gold``, the index
        of the right option or -1
    :raises UsageError: if columns are missing or an answer is no letter
    """
    names = {name if name in LETTERS else name.lower(): name for name in dataset.column_names}
    missing = [name for name in ("question", *LETTERS) if name not in names]
    if missing:
        raise UsageError(f"the data set has no column {missing[0]!r}, only {', '.join(names.values())}; rename them")

    def rotate(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        result: dict[str, list[Any]] = {"question_id": [], "question": [], "options": [], "rotation": [], "gold": []}
        for row, index in enumerate(indices):
            # As text: a .csv column with numbers only is read as numbers.
            options = [str(rows[names[letter]][row]) for letter in LETTERS]
            gold = _index(rows[names["answer"]][row], index) if "answer" in names else UNKNOWN
            identity = str(rows[names["question_id"]][row]) if "question_id" in names else str(index)
            for rotation in range(len(LETTERS)):
                result["question_id"].append(identity)
                result["question"].append(str(rows[names["question"]][row]).strip())
                result["options"].append(options[rotation:] + options[:rotation])
                result["rotation"].append(rotation)
                result["gold"].append(gold if gold == UNKNOWN else (gold - rotation) % len(LETTERS))
        return result

    return dataset.map(rotate, batched=True, with_indices=True, remove_columns=dataset.column_names)


def _index(answer: Any, row: int) -> int:
    letter = str(answer).strip().upper()
    if letter not in LETTERS or len(letter) != 1:
        raise UsageError(f"the answer of row {row} is {answer!r}; write A, B, C or D")
    return LETTERS.index(letter)


def doc_to_text(doc: dict[str, Any]) -> str:
    """The prompt, in MMLU's form.

    :param doc: a rotated row
    """
    options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, doc["options"], strict=True))
    return f"{doc['question']}\n{options}\nAnswer:"


def doc_to_choice(doc: dict[str, Any]) -> list[str]:
    """The letters.

    :param doc: a rotated row
    """
    return list(LETTERS[: len(doc["options"])])


def process_results(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """A rotation's accuracy, and what the average over rotations needs; nothing where there is no key.

    :param doc: a rotated row
    :param results: log-likelihoods of the letters
    """
    if doc["gold"] == UNKNOWN:
        return {}
    scores = [score for score, _ in results]
    rotated = (doc["question_id"], doc["rotation"], scores, (doc["gold"] + doc["rotation"]) % len(scores))
    return {"acc": float(scores.index(max(scores)) == doc["gold"]), "acc_averaged": rotated}


def averaged_choice(rotations: Iterable[tuple[int, Sequence[float]]]) -> int:
    """The option that is most likely on average over rotations.

    :param rotations: rotation and log-likelihoods of the letters, for each rotation of one question
    :return: its index in the original order
    """
    totals = [0.0] * len(LETTERS)
    for rotation, scores in rotations:
        # Normalised over the letters, so that each rotation counts the same.
        highest = max(scores)
        weights = [math.exp(score - highest) for score in scores]
        for place, weight in enumerate(weights):
            totals[(place + rotation) % len(scores)] += weight / math.fsum(weights)
    return totals.index(max(totals))


def averaged_accuracy(items: Iterable[tuple[str, int, Sequence[float], int]]) -> float:
    """Share of questions whose averaged choice is right; aggregation of ``acc_averaged``.

    :param items: question, rotation, log-likelihoods of the letters, and index of the right option in original order
    """
    questions: dict[str, list[tuple[int, Sequence[float]]]] = {}
    right: dict[str, int] = {}
    for question, rotation, scores, gold in items:
        questions.setdefault(question, []).append((rotation, scores))
        right[question] = gold
    return sum(averaged_choice(seen) == right[question] for question, seen in questions.items()) / len(questions)
