"""The one direction of imports, and what may import what."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("webhook_app", "pollers", "jobs")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports(path):
    """Dotted names of everything a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def place(path):
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


def imports_of(*prefixes):
    return {
        place(path)
        for path in FILES
        for name in imports(path)
        if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)
    }


def below(*prefixes):
    return {
        place(path)
        for path in FILES
        if any(place(path) == prefix or place(path).startswith(prefix + ".") for prefix in prefixes)
    }


CORE = below("webhook_app") - below("webhook_app.web", "webhook_app.app")


def test_the_core_imports_neither_web_nor_jobs_nor_pollers():
    assert not CORE & imports_of("webhook_app.web", "webhook_app.app", "jobs", "pollers")


def test_pollers_import_only_the_core_and_jobs_never_the_web():
    assert not below("pollers") & imports_of("jobs", "webhook_app.web", "webhook_app.app")
    assert not below("jobs") & imports_of("webhook_app.web", "webhook_app.app")
    assert not below("webhook_app.web") & imports_of("jobs", "pollers")


@pytest.mark.parametrize(
    ("library", "doors"),
    [
        (("flask", "flask_smorest", "werkzeug", "marshmallow"), {"webhook_app.web", "webhook_app.app"}),
        (("rq_scheduler",), {"jobs.schedule"}),
        (("rq",), {"jobs", "webhook_app.queues"}),
        (
            ("http.client", "ssl", "socket"),
            {
                "webhook_app.outbound",
                "webhook_app.dialing",
                "webhook_app.embedded",
                "webhook_app.supervisor",
                "webhook_app.web.arrivals",
                "webhook_app.web.uploads",
                "webhook_app.web.worker",
            },
        ),
        (("ssrfguard",), {"webhook_app.destinations"}),
        (("prometheus_client",), {"webhook_app.metrics"}),
        (("alembic",), {"webhook_app.migrations"}),
        (("jwt",), {"webhook_app.platforms.github"}),
        (("cryptography.fernet",), {"webhook_app.sealing", "webhook_app.settings", "webhook_app.up"}),
    ],
)
def test_each_library_has_its_door(library, doors):
    simulated = below("webhook_app.simulated")
    assert imports_of(*library) - below(*doors) - simulated == set()


def test_pure_modules_import_no_clock_no_network_and_no_store():
    pure = below(
        "webhook_app.lifecycle", "webhook_app.progress", "webhook_app.polling", "webhook_app.signing"
    )
    pure |= below("webhook_app.platforms", "webhook_app.redaction", "webhook_app.secret_shapes")
    pure |= below("webhook_app.logs")
    impure = (
        "time",
        "random",
        "secrets",
        "socket",
        "requests",
        "urllib.request",
        "sqlalchemy",
        "redis",
        "os",
    )
    assert not pure & imports_of(*impure)
    for path in FILES:
        if place(path) in pure:
            assert "utcnow" not in path.read_text()
            assert ".now(" not in path.read_text()


def test_the_simulation_is_used_by_the_demo_alone():
    users = imports_of("webhook_app.simulated") - below("webhook_app.simulated")
    assert users == {"webhook_app.cli"}


def test_there_are_no_import_cycles():
    known = {place(path) for path in FILES}
    edges = {
        place(path): {
            next((name for name in (full, full.rpartition(".")[0]) if name in known), None)
            for full in imports(path)
        }
        - {None, place(path)}
        for path in FILES
    }
    done: set[str] = set()

    def visit(module, trail):
        assert module not in trail, " -> ".join([*trail, module])
        if module in done:
            return
        for other in edges[module]:
            visit(other, [*trail, module])
        done.add(module)

    for module in edges:
        visit(module, [])


def test_no_file_is_over_a_thousand_lines():
    assert [place(path) for path in FILES if len(path.read_text().splitlines()) > 1000] == []
