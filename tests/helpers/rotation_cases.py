"""Two questions in every rotation, and the samples of a model that likes one option."""

import json

from sinkprune_plugin.lm_eval import rotations

# The columns that the authors' own program reads, with a column of numbers.
ROWS = {
    "question_id": ["q7", "q9"],
    "Question": ["What? ", "How many?"],
    "A": ["a", 1],
    "B": ["b", 2],
    "C": ["c", 3],
    "D": ["d", 4],
}


def docs(columns):
    from datasets import Dataset

    return list(rotations.process_docs(Dataset.from_dict({k: [str(v) for v in c] for k, c in columns.items()})))


def likes(doc, option, bias=0.0):
    """Log-likelihoods of a model that prefers one option by 1 and the first place by ``bias``."""
    return [(float(text == option) + bias * (place == 0), False) for place, text in enumerate(doc["options"])]


def samples_file(path, rotated, option):
    samples = [{"doc": doc, "filtered_resps": likes(doc, option[doc["question_id"]])} for doc in rotated]
    # Any order: the rotation is named in each sample.
    path.write_text("".join(json.dumps(sample) + "\n" for sample in reversed(samples)))
    return path
