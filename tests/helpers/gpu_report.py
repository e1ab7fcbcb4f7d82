"""The outcome of the GPU tests as JSON beside pytest's text: `pytest -m gpu --gpu-report=FILE`.

A test puts what it measures into the fixture ``measured``, a dict.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

_PACKAGES = ("torch", "triton", "transformers", "vllm", "llmcompressor", "compressed-tensors")


def pytest_addoption(parser):
    parser.addoption("--gpu-report", metavar="FILE", help="write outcomes and measurements of the tests to a JSON file")


@pytest.fixture
def measured(request):
    """What a test measured, for the report."""
    numbers = {}
    yield numbers
    request.node.user_properties.append(("measured", numbers))


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


class GpuReport:
    """Collects reports of tests.

    :param path: of the JSON file
    """

    def __init__(self, path):
        self.path = Path(path)
        self.tests = {}

    def pytest_runtest_logreport(self, report):
        test = self.tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        test["seconds"] = round(test["seconds"] + report.duration, 3)
        if report.outcome != "passed":
            test["outcome"] = report.outcome
            test["reason"] = report.longrepr[-1] if report.skipped else report.longreprtext[-4000:]
        measured = dict(report.user_properties).get("measured")
        if measured:
            test["measured"] = measured

    def pytest_sessionfinish(self, exitstatus):
        import torch

        gpu = torch.cuda.is_available()
        properties = torch.cuda.get_device_properties(0) if gpu else None
        outcomes = [test["outcome"] for test in self.tests.values()]
        report = {
            "device": properties.name if properties else None,
            "compute_capability": list(torch.cuda.get_device_capability()) if gpu else None,
            "memory_bytes": properties.total_memory if properties else None,
            "devices": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "cusparselt": torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None,
            "python": sys.version.split()[0],
            "versions": {name: _version(name) for name in _PACKAGES},
            "exit_status": int(exitstatus),
            "counts": {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))},
            "tests": self.tests,
        }
        self.path.write_text(json.dumps(report, indent=1) + "\n")


def pytest_configure(config):
    path = config.getoption("--gpu-report")
    if path:
        config.pluginmanager.register(GpuReport(path), "gpu-report")
