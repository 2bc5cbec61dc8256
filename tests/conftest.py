"""What the tests share: real servers, one per session, and a fresh database per test."""

import logging
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from redis import Redis
from sqlalchemy import Engine, make_url

from tests import caller, hub, postgres, wire
from webhook_app import db, embedded, loglines, migrations, outbound
from webhook_app.supervisor import tied_to_parent

LONGEST_BASE = 60
"""Characters of a temporary directory with room for a socket's name in it: its path holds about a hundred."""


LOOPBACK = "127.0.0.1,localhost,::1"


def pytest_configure() -> None:
    """What the shell has set must not matter, to us and to all processes we start.

    No setting of BuildRelay counts, no proxy stands before our own servers, and where $TMPDIR is too long
    for their sockets we work in /tmp.  And no example fails because the machine is busy.
    """
    ours = hub.clean_environment({})
    for name in set(os.environ) - set(ours):
        del os.environ[name]
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), LOOPBACK)))
    if len(tempfile.gettempdir()) > LONGEST_BASE:
        os.environ["TMPDIR"] = tempfile.tempdir = "/tmp"
    unhurried = [HealthCheck.too_slow]
    settings.register_profile("unhurried", settings.default, deadline=None, suppress_health_check=unhurried)
    settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """`wait_until(condition, seconds=60)`: poll a condition; fail when it isn't met in time.

    The time is for the slowest and busiest machine: it costs nothing when all is well.
    """

    def wait(condition: Callable[[], object], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s"
            time.sleep(0.01)

    return wait


@contextmanager
def _redis_server(data_dir: Path, wait: Callable[..., None]) -> Iterator[str]:
    with subprocess.Popen(embedded.command(data_dir), preexec_fn=tied_to_parent()) as process:
        try:
            wait(lambda: embedded.answers(data_dir) or process.poll() is not None)
            assert process.poll() is None, "the embedded Redis did not start"
            yield embedded.redis_url(data_dir)
        finally:
            process.terminate()
            process.wait(timeout=60)


@pytest.fixture(scope="session")
def redis_url(wait_until: Callable[..., None]) -> Iterator[str]:
    """The URL of a real embedded server, for all tests; use `redis_client` to find it empty."""
    # A short path of our own: pytest's is often longer than a socket path may be.
    with (
        tempfile.TemporaryDirectory(prefix="buildrelay-") as name,
        _redis_server(Path(name), wait_until) as url,
    ):
        yield url


@pytest.fixture
def redis_client(redis_url: str) -> Iterator[Redis]:
    """A client of the session's server, which is empty before and after the test."""
    with Redis.from_url(redis_url) as client:
        client.flushall()
        yield client
        client.flushall()


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The SQLAlchemy URL of a real PostgreSQL server: TEST_DATABASE_URL, else one of our own."""
    given = os.environ.get("TEST_DATABASE_URL", "")
    if given:
        yield "postgresql+psycopg://" + given.partition("://")[2]
        return
    with postgres.server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The SQLAlchemy URL of a fresh, empty database; the test runs once on each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'test.db'}"
        return
    with postgres.fresh_database(request.getfixturevalue("postgres_url")) as url:
        yield url


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with the present schema, to be copied."""
    path = tmp_path_factory.mktemp("migrated") / "template.db"
    made = db.connect(f"sqlite:///{path}")
    migrations.upgrade(made)
    with made.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    made.dispose()
    return path


@pytest.fixture(scope="session")
def migrated_postgres(postgres_url: str) -> Iterator[str]:
    """The name of a PostgreSQL database with the present schema, to be used as a template."""
    with postgres.fresh_database(postgres_url) as url:
        made = db.connect(url)
        migrations.upgrade(made)
        made.dispose()
        yield str(make_url(url).database)


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The SQLAlchemy URL of a fresh database with the present schema; the test runs once on each kind."""
    if request.param == "sqlite":
        path = tmp_path / "store.db"
        shutil.copy(request.getfixturevalue("migrated_sqlite"), path)
        yield f"sqlite:///{path}"
        return
    template = request.getfixturevalue("migrated_postgres")
    with postgres.fresh_database(request.getfixturevalue("postgres_url"), template) as url:
        yield url


@pytest.fixture
def postgres_engine(postgres_url: str, migrated_postgres: str) -> Iterator[Engine]:
    """An engine on a fresh PostgreSQL database with the present schema."""
    with postgres.fresh_database(postgres_url, migrated_postgres) as url:
        made = db.connect(url)
        yield made
        made.dispose()


@pytest.fixture
def engine(store_url: str) -> Iterator[Engine]:
    """An engine on a fresh database with the present schema, once per kind of database."""
    made = db.connect(store_url, "NORMAL")
    yield made
    made.dispose()


@pytest.fixture
def make_api(redis_client: Redis, redis_url: str) -> Iterator[Callable[..., caller.Caller]]:
    """`make_api(database_url, **environment)`: a caller of a new application."""
    made = []

    def make(database_url: str, **more: str) -> caller.Caller:
        made.append(caller.application(database_url, more.pop("REDIS_URL", redis_url), **more))
        return caller.Caller(made[-1])

    yield make
    for app in made:
        app.extensions["buildrelay"].engine.dispose()
        app.extensions["buildrelay"].redis.close()


@pytest.fixture
def api(make_api: Callable[..., caller.Caller], store_url: str) -> caller.Caller:
    """A caller with every scope, once per kind of database."""
    return make_api(store_url)


@pytest.fixture
def local(make_api: Callable[..., caller.Caller], migrated_sqlite: Path, tmp_path: Path) -> caller.Caller:
    """A caller with every scope, on SQLite: for what no database decides."""
    path = tmp_path / "local.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    return make_api(f"sqlite:///{path}")


@pytest.fixture
def serve() -> Iterator[Callable[..., wire.Server]]:
    """`serve(handler)`: a server on the loopback interface, which shows what it was asked."""
    listeners: list[wire.Listener] = []

    def start(handler: wire.Handler, context: ssl.SSLContext | None = None) -> wire.Server:
        listeners.append(wire.Listener(handler, context))
        return listeners[-1].server

    yield start
    outbound.close_idle()
    for listener in listeners:
        listener.stop()


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A command that sets up the log of its process does so for its test only."""
    root, level, hook = logging.getLogger(), logging.getLogger().level, sys.excepthook
    yield
    for handler in list(root.handlers):
        if isinstance(handler.formatter, loglines.Formatter):
            root.removeHandler(handler)
    root.setLevel(level)
    sys.excepthook = hook


@pytest.fixture
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No proxy and no certificates of this machine, and no connection of an earlier test."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in (
            "REQUESTS_CA_BUNDLE",
            "CURL_CA_BUNDLE",
            "SSL_CERT_FILE",
        ):
            monkeypatch.delenv(name)
    outbound.close_idle()
    yield
    outbound.close_idle()


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have been connected to; nothing is."""
    attempts: list[str] = []

    def dial(addresses: Any, _budget: Any) -> None:
        attempts.extend(each.sockaddr[0] for each in addresses)
        raise ConnectionRefusedError("not in a test")

    monkeypatch.setattr(outbound, "_dial", dial)
    return attempts
