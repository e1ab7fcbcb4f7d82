"""What the tests of the training tools share."""

import pytest

from sinkprune_plugin.text_windows import embedded_text, read_documents


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "train.txt"
    path.write_text(read_documents(embedded_text("calibration"))[0], encoding="utf-8")
    return path
