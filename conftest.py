"""A run of the tests leaves no files behind in the repository."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Before anything imports triton: its own library functions are made for the interpreter, or not, where they are
    # imported, and llm-compressor and transformers import it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest_plugins = ["gpu_report"]

REPOSITORY = Path(__file__).parent

# A time limit for single examples says more about the machine than about the code; pytest-timeout looks after tests.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")


def _files() -> set[str]:
    listed = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=all"], cwd=REPOSITORY, capture_output=True, text=True
    )
    return set(listed.stdout.splitlines()) if listed.returncode == 0 else set()


@pytest.fixture(scope="session", autouse=True)
def _no_files_left_behind(request):
    before = _files()
    yield
    # With several workers one may see another's file while it lasts; then only the last one to finish could tell.
    if not hasattr(request.config, "workerinput"):
        left = _files() - before
        assert not left, f"the tests left files behind: {sorted(left)}"
