"""tools/make_embedded_text.py, run as a script: whole sentences, documents of one size."""

import json
import subprocess
import sys
from pathlib import Path

from sinkprune_plugin.text_windows import read_documents


def test_making_the_embedded_text(tmp_path):
    sentences = " ".join(f"This is sentence number {index} of a long speech." for index in range(2000))
    speeches = [{"year": 1800 + index, "president": "A", "text": sentences} for index in range(40)]
    for split in ("train", "test"):
        text = "".join(json.dumps(speech) + "\n" for speech in speeches)
        (tmp_path / f"sotu_{split}.jsonl").write_text(text, encoding="utf-8")
    script = Path(__file__).parent.parent / "tools" / "make_embedded_text.py"
    command = [sys.executable, str(script), str(tmp_path), "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    documents = read_documents(tmp_path / "calibration.jsonl")
    assert len(documents) == 24
    for document in documents:
        assert 11_000 < len(document) <= 12_000
        assert document.startswith("This is sentence")
        assert document.endswith("speech.")
