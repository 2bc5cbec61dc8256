"""Packages of npm for the tests that ask a JavaScript library for a second opinion."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest


def missing(reason):
    """Skip, but not where Node is a must (`.ci/run`, or any CI)."""
    if os.environ.get("NODE_NEEDED") or os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(reason)
    pytest.skip(reason)


def install(sources, config):
    """The folder in pytest's cache where the files of `sources` lie beside the packages they lock."""
    if not (shutil.which("node") and shutil.which("npm")):
        missing("node and npm are not installed")
    directory = Path(config.cache.mkdir(sources.name))
    installed = directory / "installed"  # written last: what it says is whole
    wanted = (sources / "package-lock.json").read_text()
    for path in sources.iterdir():
        shutil.copy(path, directory)
    if not installed.exists() or installed.read_text() != wanted:
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        if not os.access(Path.home(), os.W_OK):  # where its cache would be
            command.append(f"--cache={directory / 'npm'}")
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
        if done.returncode:
            missing(f"npm ci failed: {done.stderr.strip()[-500:]}")
        installed.write_text(wanted)
    return directory


def check_lock(sources, *expected):
    """The lock pins these packages by their hashes, and names no registry."""
    lock = json.loads((sources / "package-lock.json").read_text())
    packages = {name: facts for name, facts in lock["packages"].items() if name}
    assert {f"node_modules/{name}" for name in expected} <= packages.keys()
    assert all(facts["integrity"].startswith("sha512-") for facts in packages.values())
    assert "resolved" not in json.dumps(lock)
