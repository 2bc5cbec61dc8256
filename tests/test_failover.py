"""Servers that hang, that are demoted, that move: a push is 2xx or 503 in time, and all goes on by itself."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from urllib.parse import urlsplit

import pytest
from redis import Redis
from sqlalchemy import make_url, text

from tests import hub as hubs
from tests import postgres
from tests.hub import PATIENCE_SECONDS, until
from tests.proxy import Proxy
from webhook_app import db, deadline, migrations, queues, settings
from webhook_app.db import GroupCommit, StoreUnavailable

ANSWER_SECONDS = 10.0
"""Within which every push is answered."""

RESUME_SECONDS = 60.0
"""The goal is 15 s; a busy machine may take longer, and that is no fault."""
"""Within which all goes on once there is a server that can be written."""


@pytest.fixture
def proxied(postgres_engine):
    """A proxy before a migrated database, and an engine that goes through it."""
    with Proxy(postgres.address(postgres_engine.url)) as proxy:
        made = db.connect(postgres.through(postgres_engine.url, proxy.port))
        yield proxy, made
        made.dispose()


def count(engine):
    return db.as_writer(engine, lambda write: write.new_id("events"))


# ---- limits ----------------------------------------------------------------------------------


def test_every_session_has_limits_at_the_server_and_at_its_socket(proxied):
    _proxy, engine = proxied
    with db.reading(engine) as connection:
        names = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
        asked = {name: connection.execute(text(f"SHOW {name}")).scalar() for name in names}
        assert asked == {
            "statement_timeout": "7s",
            "lock_timeout": "6500ms",
            "idle_in_transaction_session_timeout": "5s",
        }
        told = connection.connection.driver_connection.info.get_parameters()
    assert {name: told[name] for name in ("connect_timeout", "tcp_user_timeout", "keepalives_idle")} == {
        "connect_timeout": "3",
        "tcp_user_timeout": "5000",
        "keepalives_idle": "5",
    }


def test_what_the_address_says_of_limits_counts(postgres_url):
    engine = db.connect(postgres_url + "&connect_timeout=9&options=-c%20lock_timeout%3D1234")
    with db.reading(engine) as connection:
        assert connection.execute(text("SHOW lock_timeout")).scalar() == "1234ms"
        assert connection.connection.driver_connection.info.get_parameters()["connect_timeout"] == "9"
    engine.dispose()


def test_a_read_that_counts_much_may_take_longer(postgres_engine, monkeypatch):
    monkeypatch.setattr(deadline, "UNIT_SECONDS", 0.2)
    with db.reading(postgres_engine, 30) as connection:
        assert connection.execute(text("SHOW statement_timeout")).scalar() == "30s"
        connection.execute(text("SELECT pg_sleep(0.4)"))
    with pytest.raises(StoreUnavailable), db.reading(postgres_engine) as connection:
        connection.execute(text("SELECT pg_sleep(0.4)"))


STATES = (
    "25006",
    "25P03",
    "57P01",
    "57P02",
    "57P03",
    "57014",
    "53300",
    "53100",
    "08006",
    "58030",
    "XX001",
    "40001",
)


@pytest.mark.parametrize("state", STATES)
def test_whatever_is_wrong_with_the_server_is_no_fault_of_ours(postgres_engine, state):
    """503, not 500; and the next unit works."""
    failing = text(f"DO $$ BEGIN RAISE EXCEPTION 'so' USING ERRCODE = '{state}'; END $$")
    with pytest.raises(StoreUnavailable, match="so"):
        db.as_writer(postgres_engine, lambda write: write.connection.execute(failing))
    with pytest.raises(StoreUnavailable, match="so"), db.reading(postgres_engine) as connection:
        connection.execute(failing)
    count(postgres_engine)


@pytest.mark.parametrize(("state", "is_lost"), [("25006", True), ("57P01", True), ("53100", False)])
def test_a_server_of_no_use_costs_it_every_pooled_connection(postgres_engine, state, is_lost):
    """Those as well that another thread has used."""
    process = text("SELECT pg_backend_pid()")
    with db.reading(postgres_engine) as one, db.reading(postgres_engine) as two:
        before = {each.execute(process).scalar() for each in (one, two)}
    with pytest.raises(StoreUnavailable), db.reading(postgres_engine) as connection:
        connection.execute(text(f"DO $$ BEGIN RAISE EXCEPTION 'so' USING ERRCODE = '{state}'; END $$"))
    with db.reading(postgres_engine) as one, db.reading(postgres_engine) as two:
        after = {each.execute(process).scalar() for each in (one, two)}
    assert (not before & after) is is_lost


def test_a_migration_is_not_cut(postgres_url, monkeypatch):
    """It waits for the lock of another one for longer than a unit may take."""
    monkeypatch.setattr(deadline, "UNIT_SECONDS", 0.5)
    with (
        postgres.fresh_database(postgres_url) as url,
        closing(postgres.connect(url)) as holder,
        ThreadPoolExecutor(1) as pool,
    ):
        holder.execute("SELECT pg_advisory_lock(7208312001)")
        engine = db.connect(url)
        waiting = pool.submit(migrations.upgrade, engine)
        asked = (
            "SELECT now() - query_start > interval '1 second' FROM pg_stat_activity"
            " WHERE wait_event = 'advisory' AND datname = current_database()"
        )
        until(lambda: holder.execute(asked).fetchone() == (True,), PATIENCE_SECONDS, "a migration that waits")
        holder.execute("SELECT pg_advisory_unlock(7208312001)")
        waiting.result(PATIENCE_SECONDS)
        assert migrations.is_current(engine)
        engine.dispose()


def test_a_connection_that_swallows_everything_ends_with_the_unit(proxied, monkeypatch):
    proxy, engine = proxied
    count(engine)
    monkeypatch.setattr(deadline, "UNIT_SECONDS", 1.5)

    def cut_off(write):
        proxy.swallow()
        return write.new_id("events")

    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="did not answer"):
        db.as_writer(engine, cut_off)
    assert time.monotonic() - began < ANSWER_SECONDS
    began = time.monotonic()
    with pytest.raises(StoreUnavailable), db.reading(engine) as connection:
        connection.execute(text("SELECT 1"))
    assert time.monotonic() - began < ANSWER_SECONDS
    monkeypatch.undo()
    proxy.lead_to(proxy.target)
    count(engine)  # once the server has ended the transaction that was cut off


def test_a_pooled_connection_that_went_silent_costs_a_unit_nothing_but_time(proxied):
    proxy, engine = proxied
    count(engine)
    proxy.swallow()
    proxy.lead_to(proxy.target)  # the old connection stays swallowed
    count(engine)


def test_a_machine_cut_off_with_the_writers_lock_frees_the_others(proxied, postgres_engine):
    """Its session is open, its transaction too, and nothing comes from it any more."""
    proxy, engine = proxied
    held, over = threading.Event(), threading.Event()

    def cut_off(write):
        held.set()
        over.wait(60)

    with ThreadPoolExecutor(1) as pool:
        holder = pool.submit(db.as_writer, engine, cut_off)
        assert held.wait(60)
        proxy.swallow()
        count(postgres_engine)  # within the time of one unit
        over.set()
        with pytest.raises(StoreUnavailable):
            holder.result(60)


def test_a_name_that_is_looked_up_for_ever_ends_with_the_unit(monkeypatch):
    over = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: over.wait(60) and [])
    monkeypatch.setattr(deadline, "UNIT_SECONDS", 0.3)
    engine = db.connect("postgresql+psycopg://nobody@db.example.com/none")
    with pytest.raises(StoreUnavailable, match="no connection"):
        count(engine)
    over.set()


def test_reads_wait_for_a_connection_and_leave_one_to_writers(postgres_engine, monkeypatch):
    engine = db.connect(postgres_engine.url.render_as_string(hide_password=False), connections=3)
    inside, over = threading.Semaphore(0), threading.Event()

    def read():
        with db.reading(engine) as connection:
            inside.release()
            over.wait(60)
            return connection.execute(text("SELECT 1")).scalar()

    with ThreadPoolExecutor(4) as pool:
        reads = [pool.submit(read) for _ in range(4)]
        assert inside.acquire(timeout=60)
        assert inside.acquire(timeout=60)
        assert engine.pool.checkedout() == 2
        count(engine)
        over.set()
        assert [read.result(60) for read in reads] == [1] * 4
    monkeypatch.setattr(deadline, "UNIT_SECONDS", 0.2)
    limit = engine.get_execution_options()["connection_limit"]
    with db._slot(limit.reads), db._slot(limit.reads), pytest.raises(StoreUnavailable), db.reading(engine):
        pass
    engine.dispose()


# ---- group commit ----------------------------------------------------------------------------


def stuck():
    """A group commit whose groups hang; when the first has begun; what lets them go on."""
    entered, over = threading.Event(), threading.Event()

    def run(arguments):
        entered.set()
        assert over.wait(60)
        return arguments

    return GroupCommit(run), entered, over


def test_who_waits_behind_a_group_that_hangs_is_told_so_in_time(monkeypatch, wait_until):
    group, entered, over = stuck()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(group, "first")
        assert entered.wait(60)
        monkeypatch.setattr(deadline, "UNIT_SECONDS", 0.2)
        late = [pool.submit(group, name) for name in ("a", "b")]
        for one in late:
            assert isinstance(one.exception(60), StoreUnavailable)
        assert not group._waiting
        over.set()
        assert first.result(60) == "first"
        monkeypatch.undo()
        assert group("later") == "later"


def test_a_request_that_waited_too_long_for_a_thread_is_not_begun(monkeypatch):
    group = GroupCommit(lambda arguments: arguments)
    deadline.note_wait(ANSWER_SECONDS)
    try:
        with pytest.raises(StoreUnavailable):
            group("a")
    finally:
        deadline.note_wait(0.0)
    assert group("a") == "a"


def test_the_unit_of_a_group_ends_when_its_first_member_must_be_answered():
    left = []
    group = GroupCommit(lambda arguments: left.append(deadline.left()) or arguments)
    deadline.note_wait(deadline.UNIT_SECONDS - 1)
    try:
        group("a")
    finally:
        deadline.note_wait(0.0)
    assert 0 < left[0] <= 1


# ---- several hosts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "host", "port"),
    [
        ("postgres://u:p@h1:5432,h2:5433/d", "h1,h2", "5432,5433"),
        ("postgres://u:p@h1,h2:5433/d?sslmode=require", "h1,h2", "5432,5433"),
        ("postgres://u:p@[::1]:5,h2/d", "::1,h2", "5,5432"),
        ("postgres://u:p%40x@h1,h2", "h1,h2", "5432,5432"),
    ],
)
def test_several_hosts_are_taken_as_libpq_writes_them(given, host, port):
    url = settings.load({"DATABASE_URL": given}).database_url
    engine = db.connect(url)
    _, asked = engine.dialect.create_connect_args(engine.url)
    assert (asked["host"], asked["port"], asked["user"]) == (host, port, "u")
    assert asked["target_session_attrs"] == "read-write"
    assert asked.get("sslmode") == make_url(url).query.get("sslmode")
    assert "p%40x" not in given or asked["password"] == "p@x"


def test_what_the_address_says_of_the_session_counts_and_one_host_has_nothing_of_it():
    for given, expected in (
        ("postgres://h1,h2/d?target_session_attrs=any", "any"),
        ("postgres://h1/d", None),
        ("postgres://h1/d?target_session_attrs=read-write", "read-write"),
    ):
        engine = db.connect(settings.load({"DATABASE_URL": given}).database_url)
        assert engine.dialect.create_connect_args(engine.url)[1].get("target_session_attrs") == expected


@pytest.mark.parametrize("wrong", ["postgres://u@h1:x,h2/d", "postgres://u@h1:1:2,h2/d"])
def test_hosts_that_can_not_be_read_stop_the_start(wrong):
    with pytest.raises(settings.SettingsError, match="DATABASE_URL"):
        settings.load({"DATABASE_URL": wrong})


# ---- the whole program -----------------------------------------------------------------------


_WORLD = threading.Lock()


class Sender:
    """GitHub pushing build after build, each webhook until it is taken.  A context manager.

    `answers`: (when, seconds, status, `Retry-After`) of each.  At the end of the block the last build is sent whole.
    """

    def __init__(self, hub, platforms):
        self.hub, self.platforms = hub, platforms
        self.answers, self.builds = [], []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def stop(self):
        """Begin no further build."""
        self._over.set()

    def __exit__(self, *_):
        self.stop()
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive()

    def _run(self):
        while not self._over.is_set():
            with _WORLD:
                self.builds.append(build := self.platforms.begin("github"))
            for push in self.platforms.pushes(build):
                until(lambda push=push: self._is_taken(push), PATIENCE_SECONDS * 2, "a 2xx")

    def _is_taken(self, push):
        began = time.monotonic()
        reply = self.hub.push(push, self.platforms.servers["github"].url)
        ended = time.monotonic()
        self.answers.append((ended, ended - began, reply.status_code, reply.headers.get("Retry-After")))
        return reply.ok

    def taken_since(self, moment):
        """The time of the first push that was taken after that moment, or None."""
        return next((at for at, _, status, _ in list(self.answers) if status == 202 and at > moment), None)

    def refused_since(self, moment):
        return any(status == 503 and at > moment for at, _, status, _ in list(self.answers))

    def check(self):
        """Each was 202 or 503, and in time; a machine that is busy with this very crowd may be slower."""
        print("slowest answers", sorted(seconds for _, seconds, _, _ in self.answers)[-3:])
        assert {status for _, _, status, _ in self.answers} <= {202, 503}
        assert all(again for _, _, status, again in self.answers if status == 503)
        assert [
            (seconds, status) for _, seconds, status, _ in self.answers if seconds >= 3 * ANSWER_SECONDS
        ] == []


def relay(stack):
    """A whole BuildRelay behind two proxies, with a callback, and GitHub that pushes to it.

    The sender, the callback, and per store its proxy and URL.
    """
    database = stack.enter_context(postgres.server())
    redis, _server = stack.enter_context(hubs.own_redis())
    before_database = stack.enter_context(Proxy(postgres.address(database)))
    before_redis = stack.enter_context(Proxy(urlsplit(redis).path))
    platforms = stack.enter_context(hubs.Platforms())
    hub = stack.enter_context(
        hubs.running(
            {
                **platforms.environment(),
                "DATABASE_URL": postgres.through(database, before_database.port),
                "REDIS_URL": f"redis://127.0.0.1:{before_redis.port}",
                "WEB_CONCURRENCY": "1",
            }
        )
    )
    callback = stack.enter_context(hubs.Callback())
    callback.trust(hub.subscribe(callback.url)["secret"])
    return Sender(hub, platforms), callback, (before_database, database), (before_redis, redis)


def is_complete(callback, sender, builds):
    """Has every event of these builds come to the callback, in order and once?"""
    told = {
        build.build_id: [event["sequence"] for event in sender.hub.events(build.build_id)] for build in builds
    }
    return all(callback.sequences(build_id) == sequences for build_id, sequences in told.items())


def test_a_failover_of_either_store_is_over_soon_and_nothing_is_lost():
    """The old servers stay there, answer, and can't be written any more."""
    with ExitStack() as stack:
        sender, callback, (before_database, database), (before_redis, redis) = relay(stack)
        with sender:
            until(lambda: callback._got, PATIENCE_SECONDS, "a message")

            with closing(postgres.connect(database)) as session:
                session.execute("ALTER SYSTEM SET default_transaction_read_only = on")
                session.execute("SELECT pg_reload_conf()")
            demoted = time.monotonic()
            until(lambda: sender.refused_since(demoted), PATIENCE_SECONDS, "a 503")
            begun = sender.builds[:-1]
            twin = stack.enter_context(postgres.twin(database))
            before_database.lead_to(postgres.address(twin))
            moved = time.monotonic()
            until(lambda: sender.taken_since(moved), RESUME_SECONDS, "a push that is taken")
            until(lambda: is_complete(callback, sender, begun), RESUME_SECONDS, "the messages that were due")

            second, _server = stack.enter_context(hubs.own_redis())
            with Redis.from_url(redis) as client:
                client.execute_command("REPLICAOF", "127.0.0.1", "1")
            before_redis.lead_to(urlsplit(second).path)
            moved, begun = time.monotonic(), sender.builds[:-1]
            until(lambda: sender.taken_since(moved), RESUME_SECONDS, "a push that is taken")
            until(lambda: is_complete(callback, sender, begun), RESUME_SECONDS, "the messages that were due")
            with Redis.from_url(second) as client:
                served = lambda: queues.workers(client)[queues.DELIVER] and queues.beat(client)  # noqa: E731
                until(served, RESUME_SECONDS, "workers and a scheduler there")
        sender.check()
        for build in sender.builds:
            callback.wait_for(sender.hub, build.build_id)


def test_of_several_hosts_the_one_that_can_be_written_is_found(postgres_engine):
    """And found again when it is another one: the pooled connections are to one that is demoted."""
    database = postgres_engine.url.database
    with (
        Proxy(postgres.address(postgres_engine.url)) as one,
        Proxy(postgres.address(postgres_engine.url)) as two,
    ):
        hosts = f"127.0.0.1:{one.port},127.0.0.1:{two.port}"
        engine = db.connect(
            settings.load({"DATABASE_URL": f"postgres://postgres@{hosts}/{database}"}).database_url
        )
        count(engine)
        one.cut()
        one.lead_to("/nobody")
        count(engine)
        with closing(postgres.connect(postgres_engine.url.render_as_string(hide_password=False))) as admin:
            admin.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
            two.cut()
            with pytest.raises(StoreUnavailable, match="read-only"):
                count(engine)
            admin.execute("SET default_transaction_read_only = off")
            admin.execute(f"ALTER DATABASE {database} RESET default_transaction_read_only")
        count(engine)
        engine.dispose()
