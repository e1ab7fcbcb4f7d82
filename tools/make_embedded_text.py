"""Cut the two short text files in sinkprune_plugin/assets from a folder with the State of the Union addresses.

    python tools/make_embedded_text.py FOLDER [--output sinkprune_plugin/assets]

FOLDER holds sotu_train.jsonl and sotu_test.jsonl, one object per line with year, president and text. From speeches
spread evenly over the years, one passage each is taken: whole sentences from the middle of the speech, since the
openings are much the same. The result depends on the input alone.
"""

import argparse
import json
import re
from pathlib import Path
from typing import TypedDict

# name -> (source file, number of speeches, characters of each). About 290 KB and 175 KB.
PARTS = {
    "calibration": ("sotu_train.jsonl", 24, 12_000),
    "test": ("sotu_test.jsonl", 11, 16_000),
}
DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "sinkprune_plugin" / "assets"
SENTENCE_END = re.compile(r"[.!?][\"')]*\s+")


class Speech(TypedDict):
    year: int
    president: str
    text: str


def spread(items: list[Speech], count: int) -> list[Speech]:
    """``count`` items evenly spread over the list, or all of them."""
    count = min(count, len(items))
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]


def passage(text: str, length: int) -> str:
    """At most ``length`` characters of whole sentences around the middle of the text."""
    if len(text) <= length:
        return text.strip()
    window = text[(len(text) - length) // 2 :][:length]
    ends = [match.end() for match in SENTENCE_END.finditer(window)]
    # A text without sentences is cut at the exact length.
    return window[ends[0] : ends[-1]].strip() if len(ends) > 1 else window.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with sotu_train.jsonl and sotu_test.jsonl")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to write to")
    args = parser.parse_args()
    for name, (source, count, length) in PARTS.items():
        path = args.folder / source
        if not path.is_file():
            parser.error(f"{path} does not exist")
        speeches: list[Speech] = [json.loads(line) for line in path.open(encoding="utf-8")]
        chosen: list[Speech] = [
            {"year": speech["year"], "president": speech["president"], "text": passage(speech["text"], length)}
            for speech in spread(speeches, count)
        ]
        lines = [json.dumps(speech, ensure_ascii=False) + "\n" for speech in chosen]
        (args.output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        characters = sum(len(speech["text"]) for speech in chosen)
        print(
            f"{name}.jsonl: {len(chosen)} speeches of {source}, {chosen[0]['year']} to {chosen[-1]['year']}, "
            f"{characters} characters"
        )


if __name__ == "__main__":
    main()
