"""Multiple choice that doesn't depend on the order of the options: the mean over their rotations."""

from typing import Any

__all__ = ["doc_to_choice", "doc_to_text", "process_docs", "process_results"]

LETTERS = "ABCD"


def process_docs(dataset: Any) -> Any:
    """Each question in each rotation of its options.

    :param dataset: rows with ``question``, ``A`` … ``D`` and ``answer`` (a letter)
    :return: four rows for each, with ``options``, ``gold`` (index) and ``rotation``
    """

    def rotate(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        result: dict[str, list[Any]] = {"question": [], "options": [], "gold": [], "rotation": []}
        for question, *options, answer in zip(
            rows["question"], *(rows[k] for k in LETTERS), rows["answer"], strict=True
        ):
            gold = LETTERS.index(str(answer).strip().upper()[0])
            for rotation in range(len(LETTERS)):
                result["question"].append(question)
                result["options"].append(options[rotation:] + options[:rotation])
                result["gold"].append((gold - rotation) % len(LETTERS))
                result["rotation"].append(rotation)
        return result

    return dataset.map(rotate, batched=True, remove_columns=dataset.column_names)


def doc_to_text(doc: dict[str, Any]) -> str:
    """The prompt.

    :param doc: a rotated row
    """
    options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, doc["options"], strict=True))
    return f"{doc['question'].strip()}\n{options}\nAnswer:"


def doc_to_choice(doc: dict[str, Any]) -> list[str]:
    """The letters.

    :param doc: a rotated row
    """
    return list(LETTERS[: len(doc["options"])])


def process_results(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Whether the likeliest letter is right; the mean over rows is the mean over rotations.

    :param doc: a rotated row
    :param results: log-likelihoods of the letters
    """
    scores = [score for score, _ in results]
    return {"acc": float(scores.index(max(scores)) == doc["gold"])}
