"""What a fresh clone is installed and started from: lock files, Procfile, wheel, top level."""

import fnmatch
import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from gunicorn.app.wsgiapp import WSGIApplication

import webhook_app
from webhook_app.settings import VARIABLES

ROOT = Path(__file__).parent.parent
LOCKS = ["requirements.txt", "requirements-test.txt"]
PACKAGES = ["webhook_app", "pollers", "jobs"]
TOP_LEVEL = {
    *PACKAGES, "pyproject.toml", "tests", "wsgi.py", "Procfile", "README.md",
    "Makefile", "requirements.txt", "requirements-test.txt", "LICENSE", "CHANGELOG.md", "Dockerfile",
    "app.json", "bench", "docs",
}  # fmt: skip


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked(file):
    """{package name: (version, number of hashes)} of a lock file; fails on any line of another form."""
    packages = {}
    text = (ROOT / file).read_text().replace("\\\n", " ")
    for line in text.splitlines():
        requirement, *hashes = re.split(r"\s+--hash=", line.strip())
        form = re.fullmatch(r"([a-z0-9-]+)==([0-9a-z.]+)( ; .+)?", requirement)
        assert form, f"{file}: {requirement!r} is no pinned requirement"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes), requirement
        packages[form[1]] = (form[2], len(hashes))
    return packages


def bare(requirement):
    """`psycopg[binary]` is locked as `psycopg`, `PyYAML` as `pyyaml`."""
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-").replace(".", "-")


@pytest.mark.parametrize("file", LOCKS)
def test_every_locked_package_has_a_version_and_hashes(file):
    packages = locked(file)
    assert packages
    assert [name for name, (_, hashes) in packages.items() if not hashes] == []


@pytest.mark.parametrize("file", LOCKS)
def test_lock_files_name_no_index_and_no_host(file):
    text = (ROOT / file).read_text()
    assert "://" not in text
    assert not re.search(r"--(?!hash=)", text)
    assert not re.search(r"\b[a-z0-9-]+\.(org|com|net|io|dev|local)\b", text)


def test_the_locks_hold_every_dependency_and_what_builds_the_project(project):
    runtime, full = map(locked, LOCKS)
    needed = {bare(name) for name in project["dependencies"]} | {"setuptools"}
    assert needed - set(runtime) == set()
    assert {bare(name) for name in project["optional-dependencies"]["test"]} - set(full) == set()


def test_the_test_lock_has_the_runtime_packages_in_the_same_versions():
    runtime, full = map(locked, LOCKS)
    assert {name: full.get(name) for name in runtime} == runtime


def processes():
    """{process name: words of its command} of the Procfile."""
    lines = (ROOT / "Procfile").read_text().splitlines()
    return {name: command.split() for name, command in (line.split(": ", 1) for line in lines)}


def test_the_procfile_has_the_four_processes():
    assert list(processes()) == ["release", "web", "worker", "scheduler"]


@pytest.mark.parametrize(
    ("process", "command"), [("release", "migrate"), ("worker", None), ("scheduler", None)]
)
def test_the_procfile_names_commands_that_exist(process, command, monkeypatch, capsys):
    main = importlib.import_module("webhook_app.cli").main
    *python, name = processes()[process]
    assert python == ["python", "-m", "webhook_app"]
    assert name == (command or process)
    monkeypatch.setattr(sys, "argv", ["buildrelay", name, "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert name in capsys.readouterr().out


def test_the_console_script_and_the_module_are_the_same_command(project):
    assert project["scripts"] == {"buildrelay": "webhook_app.cli:main"}
    assert (ROOT / "webhook_app" / "__main__.py").read_text().count("from webhook_app.cli import main") == 1


def test_the_web_process_is_accepted_by_gunicorn(monkeypatch):
    program, *arguments = processes()["web"]
    assert program == "gunicorn"
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    application = WSGIApplication()  # reads the configuration, not yet the application
    assert application.app_uri == "wsgi:app"
    assert application.cfg.worker_class_str == "webhook_app.web.worker.Worker"


def test_every_variable_of_app_json_is_a_setting():
    known = {variable.name for variable in VARIABLES}
    assert set(json.loads((ROOT / "app.json").read_text())["env"]) - known == set()


def test_app_json_starts_the_processes_of_the_procfile():
    assert set(json.loads((ROOT / "app.json").read_text())["formation"]) == set(processes()) - {"release"}


def test_the_top_level_holds_nothing_else():
    lines = (ROOT / ".gitignore").read_text().splitlines()
    ignored = [line.strip("/") for line in lines if line and not line.startswith("#")]
    visible = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    kept = {name for name in visible if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)}
    assert kept - TOP_LEVEL == set()


def test_the_version_is_told_once_in_two_places(project):
    assert project["version"] == webhook_app.VERSION


def test_one_python_version_everywhere(project):
    version = re.search(r"^FROM python:(3\.[0-9]+)-slim$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert version
    assert project["requires-python"] == ">=3.11"
    assert tuple(map(int, version[1].split("."))) >= (3, 11)


def test_pre_commit_fetches_nothing():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]


def test_ci_is_one_program_that_runs_lint_and_tests():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", script], check=True)
    assert [line for line in script.read_text().splitlines() if line.startswith("make")] == [
        "make lint",
        "make test",
    ]


def test_the_wheel_holds_every_file_of_the_packages(tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "wsgi.py"):
        shutil.copy(ROOT / name, tree)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    wanted = {
        str(path.relative_to(tree))
        for name in PACKAGES
        for path in (tree / name).rglob("*")
        if path.is_file()
    }
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True)
    (wheel,) = tree.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    assert wanted - held == set()
    assert "wsgi.py" in held
    assert not [name for name in held if name.startswith(("tests/", "bench/"))]
