"""What the README says is so: settings, commands, files, and the names of the jobs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from webhook_app import cli, metrics, platforms, settings

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("variable", settings.VARIABLES, ids=lambda variable: variable.name)
def test_every_setting_is_in_the_table_with_its_default(variable):
    row = re.search(rf"^\| `{variable.name}` \| (.+?) \| (.+) \|$", README, re.MULTILINE)
    assert row, f"{variable.name} is not in the README"
    if variable.name != "WEB_CONCURRENCY":
        assert row[1] == (f"`{variable.default}`" if variable.default else "–")
    assert row[2].startswith(variable.meaning)
    for alias in variable.aliases:
        assert f"`{alias}`" in row[2]


def test_the_table_names_no_setting_that_is_gone():
    listed = set(re.findall(r"^\| `([A-Z_]+)` \|", README, re.MULTILINE))
    assert listed == {variable.name for variable in settings.VARIABLES}


def test_every_metric_is_listed_with_its_labels_and_meaning():
    told = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `buildrelay_(\w+)` \| (.+?) \| (.+) \|$", told, re.MULTILINE)
    assert rows == [
        (name, ", ".join(about.labels) or "–", about.meaning) for name, about in metrics.METRICS.items()
    ]
    assert set(re.findall(r"buildrelay_(\w+)", told)) == set(metrics.METRICS)


def test_every_command_in_the_readme_exists():
    known = set(re.findall(r"^    ([a-z]+)(?:  |$)", cli._parser().format_help(), re.MULTILINE))
    told = set(re.findall(r"(?:`|bin/)buildrelay ([a-z]+)", README))
    assert told <= known
    assert {"up", "demo", "migrate", "worker", "scheduler", "subscribers", "tokens"} <= known


def test_every_file_in_the_map_exists():
    block = README.partition("## Map of the code")[2].partition("```")[2].partition("```")[0]
    inside = False
    for line in block.splitlines():
        named, _, _ = line.partition("   ")
        inside = line.startswith("  ") and bool(line.strip())
        for name in filter(re.compile(r"[\w/]+(\.py|/)|Procfile").fullmatch, named.split()):
            path = ROOT / "webhook_app" / name if inside else ROOT / name
            assert path.exists(), f"{name} is in the README's map only"


def test_every_module_is_in_the_map_once():
    block = README.partition("## Map of the code")[2].partition("```")[2].partition("```")[0]
    for path in (ROOT / "webhook_app").iterdir():
        if path.suffix == ".py" and not path.name.startswith("_"):
            assert len(re.findall(rf"(?<![\w/]){path.name}", block)) == 1, path.name
    for path in (*(ROOT / "jobs").glob("[a-z]*.py"), *(ROOT / "pollers").glob("[a-z]*.py")):
        assert re.search(rf"\b{path.stem}\b", block), f"{path.stem} is not in the README's map"


@pytest.mark.parametrize(
    "path",
    [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))],
    ids=lambda path: path.name,
)
def test_headings_stand_alone_and_nothing_is_said_twice(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    headings = [place for place, line in enumerate(lines) if re.match("#+ ", line)]
    assert [lines[place] for place in headings if place and lines[place - 1]] == []
    long = [line for line in lines if re.match(r"#|\S.{40}", line)]
    assert {line for line in long if long.count(line) > 1} == set()


def test_every_platform_is_named():
    for name in platforms.find():
        assert name in README.lower()


def test_a_wrong_setting_stops_the_start_with_one_line():
    result = subprocess.run(
        [sys.executable, "-m", "webhook_app", "migrate"],
        env={"PATH": "/usr/bin:/bin", "BUILD_POLL_INTERVAL": "soon"},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == (
        "buildrelay: BUILD_POLL_INTERVAL='soon': a whole number from 10 to 86400000 (milliseconds) is needed\n"
    )
