"""What health checks say while something can't be written: real databases and servers in that state."""

import logging
import shutil
import sqlite3
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psycopg
import pytest
from redis import Redis
from redis.exceptions import ConnectionError as AwayError
from redis.exceptions import ResponseError
from sqlalchemy import event, text
from sqlalchemy.exc import InternalError, OperationalError

from tests import hub as hubs
from tests.caller import KEY
from webhook_app import db, doctor, migrations, models, queues, settings
from webhook_app.web import state
from webhook_app.web.state import Recent

RECEPTION = "/readyz?for=reception"


@pytest.fixture(autouse=True)
def unremembered(monkeypatch):
    """Each check looks anew."""
    monkeypatch.setattr(state, "RECENT_SECONDS", 0.0)


def spoiled(engine, pragma):
    """From now on each connection of this SQLite engine has it."""
    engine.dispose()
    event.listen(engine, "connect", lambda connection, _: connection.execute(f"PRAGMA {pragma}"))


def checks(api, path, status):
    return api.as_(None)("GET", path, status)["checks"]


# ---- the database ----------------------------------------------------------------------------


def test_reception_needs_only_the_database(make_api, store_url, tmp_path):
    api = make_api(store_url, REDIS_URL=f"unix://{tmp_path}/no.sock")
    assert checks(api, RECEPTION, 200) == {
        "database": {"ok": True, "detail": f"{api.engine.dialect.name} takes writes"},
        "migrations": {"ok": True, "detail": "the schema is current"},
    }
    assert checks(api, "/readyz", 503)["redis"]["detail"] == "Redis does not answer (ConnectionError)"
    api.as_(None)("GET", "/readyz?for=anything", 422)


def test_the_write_is_real_and_leaves_nothing(engine):
    statements = []
    event.listen(engine, "before_cursor_execute", lambda *given: statements.append(given[2].split()[0]))
    db.try_write(engine)
    assert statements[-2:] == ["INSERT", "DELETE"]
    with engine.connect() as connection:
        assert connection.execute(models.workers.select()).all() == []


def test_each_probe_of_sqlite_reaches_the_disk(local, tmp_path):
    log = tmp_path / "local.db-wal"
    db.try_write(local.engine)
    before = log.stat().st_size
    db.try_write(local.engine)
    assert log.stat().st_size > before


@pytest.mark.parametrize(
    ("pragma", "said"),
    [("max_page_count=1", "the disk is full"), ("query_only=ON", "the database is read-only")],
)
def test_a_sqlite_that_can_not_be_written_is_named(local, pragma, said, caplog):
    api = local
    with api.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.connection.execute("VACUUM")  # no page is free
    spoiled(api.engine, pragma)
    with caplog.at_level(logging.WARNING):
        assert checks(api, RECEPTION, 503)["database"] == {"ok": False, "detail": said}
        assert checks(api, "/readyz", 503)["database"]["detail"] == said
    told = [record.getMessage() for record in caplog.records if "not ready" in record.getMessage()]
    assert told.count(f"not ready: database: {said}") == 1, "once, however often it is asked"
    with pytest.raises(db.StoreUnavailable, match=f"^{said}: "):
        db.try_write(api.engine)


def test_a_full_disk_is_named_to_the_sender_the_balancer_and_in_the_log(migrated_sqlite):
    """A limit on the size of a file stands for a disk that is full: what is under it can still be written."""
    with hubs.directory() as home:
        shutil.copy(migrated_sqlite, home / "store.db")
        with sqlite3.connect(home / "store.db") as connection:
            size = connection.execute("PRAGMA page_count").fetchone()[0] * 4096
            connection.execute("PRAGMA journal_mode=WAL")
        port = hubs.free_port()
        env = hubs.clean_environment(
            {
                "DATABASE_URL": f"sqlite:///{home}/store.db", "REDIS_URL": f"unix://{home}/no.sock",
                "BUILDRELAY_BIND": f"127.0.0.1:{port}", "WEB_CONCURRENCY": "1", "BUILD_EVENT_TOKEN": "build-event-token",
                "ADMIN_TOKEN": "admin-token-of-the-tests", "ENCRYPTION_KEYS": KEY,
            }
        )  # fmt: skip
        limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
        limited = f"import resource, runpy; {limit}; runpy.run_module('gunicorn', run_name='__main__')"
        command = ["-c", limited, "--config", "python:webhook_app.gunicorn_conf", "wsgi:app"]
        with hubs.started([sys.executable, *command], home / "log", env):
            secrets = {"BUILD_EVENT_TOKEN": "build-event-token", "ADMIN_TOKEN": "admin-token-of-the-tests"}
            hub = hubs.Hub(f"http://127.0.0.1:{port}", home, home / "log", secrets)
            hubs.until(lambda: _answers(hub), hubs.PATIENCE_SECONDS, "the web process")
            assert hub.ask("GET", RECEPTION).status_code == 200
            hubs.until(lambda: _report(hub) == 503, hubs.PATIENCE_SECONDS, "a full disk")
            full = partial(hub.ask, "GET", RECEPTION)
            hubs.until(lambda: full().status_code == 503, hubs.PATIENCE_SECONDS, "no room for a small write")
            assert full().json()["checks"]["database"]["detail"] in (
                "the disk is full",
                "the disk can't be written",
            )
            assert "the store is unavailable: the disk " in hub.output()
            assert "not ready: database: the disk " in hub.output()
            hub.http.close()


def _answers(hub):
    try:
        return hub.ask("GET", "/healthz").status_code == 200
    except OSError:
        return False


def _report(hub):
    return hub.report("r1", "progress", message="x" * 50_000).status_code


def test_a_postgresql_that_is_read_only_is_named(make_api, postgres_engine):
    url = postgres_engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    api = make_api(url)
    assert checks(api, RECEPTION, 200)
    name = postgres_engine.url.database
    with postgres_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'))
    api.engine.dispose()
    assert checks(api, RECEPTION, 503)["database"] == {"ok": False, "detail": "the database is read-only"}
    found = list(doctor._database(settings.load({"DATABASE_URL": url})))
    assert found[-1].what.startswith("the database is read-only: ")


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (
            psycopg.errors.DiskFull("could not extend file"),
            OperationalError,
            "the disk of the database is full",
        ),
        (psycopg.errors.TooManyConnections("sorry"), OperationalError, "the database has no connection left"),
        (psycopg.errors.ReadOnlySqlTransaction("cannot"), InternalError, "the database is read-only"),
        (psycopg.OperationalError("to host 10.0.0.1"), OperationalError, "the database does not answer"),
    ],
)
def test_what_postgresql_says_is_put_plainly(error, kind, said):
    told = db.unavailable(kind("", {}, error))
    assert told.plain == said
    assert told.in_full() == f"{said}: {error}"


def test_a_locked_sqlite_is_named(tmp_path, local):
    with sqlite3.connect(tmp_path / "local.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        spoiled(local.engine, "busy_timeout=1")
        detail = checks(local, RECEPTION, 503)["database"]["detail"]
        assert detail == "the database is locked by another process"


# ---- a newer program's schema ----------------------------------------------------------------


NEWER = "UPDATE alembic_version SET version_num = '9999'"


@pytest.mark.parametrize(
    ("change", "standing"),
    [
        ("CREATE TABLE later (id INTEGER PRIMARY KEY, name TEXT NOT NULL)", "newer"),
        ("ALTER TABLE builds ADD COLUMN later TEXT", "newer"),
        ("ALTER TABLE builds ADD COLUMN later TEXT NOT NULL DEFAULT ''", "newer"),
        ("ALTER TABLE subscribers RENAME COLUMN url TO address", "unusable"),
        ("DROP TABLE notices", "unusable"),
    ],
)
def test_beside_a_newer_schema_we_are_ready_as_long_as_it_has_what_we_need(
    make_api, store_url, change, standing
):
    api = make_api(store_url)
    with api.engine.connect().execution_options(writing=True) as connection, connection.begin():
        connection.execute(text(NEWER))
        connection.execute(text(change))
    api.engine.dispose()
    assert migrations.standing(api.engine) == standing
    found = checks(api, RECEPTION, 200 if standing == "newer" else 503)["migrations"]
    assert found["ok"] == (standing == "newer")
    assert found["detail"].startswith("the schema is newer than this program, and ")
    (finding,) = doctor._schema(standing)
    assert (finding.level, bool(finding.mend)) == ("warn" if standing == "newer" else "fail", True)


def test_a_column_that_only_a_newer_program_can_fill_is_not_usable(make_api, postgres_engine):
    with postgres_engine.begin() as connection:
        connection.execute(text(NEWER))
        connection.execute(text("ALTER TABLE builds ADD COLUMN later TEXT NOT NULL"))
    assert migrations.standing(postgres_engine) == "unusable"


def test_an_older_schema_is_not_ready(make_api, database_url):
    engine = db.connect(database_url)
    assert migrations.standing(engine) == "older"
    migrations.upgrade(engine, "0012")
    assert migrations.standing(engine) == "older"
    engine.dispose()
    found = checks(make_api(database_url), RECEPTION, 503)
    assert found["migrations"] == {
        "ok": False,
        "detail": "the schema is not current: run `buildrelay migrate`",
    }


# ---- Redis -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("CONFIG", "SET", "maxmemory", "1"), "Redis is out of memory"),
        (("REPLICAOF", "127.0.0.1", "9"), "Redis is read-only (a replica)"),
    ],
)
def test_a_redis_that_can_not_be_written_is_named_and_reception_goes_on(
    make_api, store_url, command, said, caplog
):
    with hubs.own_redis() as (url, _), Redis.from_url(url) as redis:
        api = make_api(store_url, REDIS_URL=url)
        assert checks(api, "/readyz", 503)["redis"] == {"ok": True, "detail": "Redis takes writes"}
        redis.execute_command(*command)
        assert checks(api, "/readyz", 503)["redis"] == {"ok": False, "detail": said}
        assert checks(api, RECEPTION, 200)
        (found,) = [one for one in doctor._redis(settings.load({"REDIS_URL": url})) if one.check == "redis"]
        assert (found.level, found.what) == ("fail", said)
        assert not queues.Bell(redis).ring(queues.DELIVER)
        assert f"{said}: the next tick will find the work" in caplog.text


def test_a_worker_names_a_redis_that_can_not_be_written_in_a_line_and_goes_on_after_it(migrated_sqlite):
    with hubs.own_redis() as (url, _), Redis.from_url(url) as redis, hubs.directory() as home:
        env = {"REDIS_URL": url, "DATABASE_URL": f"sqlite:///{migrated_sqlite}"}
        command, log = [sys.executable, "-m", "jobs.worker", "sweep"], home / "log"
        with hubs.started(command, log, hubs.clean_environment(env)) as worker:
            hubs.until(lambda: queues.workers(redis)["sweep"], hubs.PATIENCE_SECONDS, "the worker")
            redis.execute_command("REPLICAOF", "127.0.0.1", "9")
            said = "Redis is read-only (a replica): the worker waits"
            hubs.until(lambda: said in log.read_text(), hubs.PATIENCE_SECONDS, said)
            redis.execute_command("REPLICAOF", "NO", "ONE")
            redis.flushall()
            hubs.until(lambda: queues.workers(redis)["sweep"], hubs.PATIENCE_SECONDS, "the worker again")
            assert "trace" not in log.read_text()
            worker.terminate()
            assert worker.wait(60) == 0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ResponseError("MISCONF Errors writing to the AOF file"), "Redis can't write to its disk"),
        (
            ResponseError("Command # 1 of pipeline caused error: OOM command not allowed"),
            "Redis is out of memory",
        ),
        (AwayError("Error 111 connecting to 10.0.0.1:6379"), "Redis does not answer (ConnectionError)"),
    ],
)
def test_what_redis_says_is_put_plainly(error, said):
    assert queues.trouble(error) == said


# ---- who asks --------------------------------------------------------------------------------


def test_however_many_ask_the_database_is_written_once_a_second(local, monkeypatch):
    monkeypatch.setattr(state, "RECENT_SECONDS", 1000.0)
    written = []
    monkeypatch.setattr(db, "try_write", lambda engine: written.append(time.sleep(0.2)))
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: local.app.test_client().get(RECEPTION).status_code, range(60)))
    assert answers == [200] * 60
    assert len(written) == 1


def test_a_check_that_hangs_holds_up_only_who_looks(monkeypatch):
    recent, go_on = Recent(), threading.Event()
    good, bad = {"a": {"ok": True}}, {"a": {"ok": False}}
    assert recent("x", lambda: good) == good
    with ThreadPoolExecutor(1) as pool:
        hangs = pool.submit(recent, "x", lambda: go_on.wait(60) and bad)
        hubs.until(recent._looking["x"].locked, 60, "the look")
        assert recent("x", lambda: bad) == good, "found a moment ago"
        monkeypatch.setattr(state, "STALE_SECONDS", 0.0)
        monkeypatch.setattr(state, "WAIT_SECONDS", 0.01)
        assert recent("x", lambda: bad) is None
        go_on.set()
        assert hangs.result(60) == bad
    monkeypatch.undo()
    assert recent("x", lambda: good) == bad, "found a moment ago"


def test_a_look_that_fails_holds_up_nobody_after_it():
    recent = Recent()
    with pytest.raises(ZeroDivisionError):
        recent("x", lambda: 1 / 0)
    assert recent("x", lambda: {"a": {}}) == {"a": {}}
