"""The engine, and the two ways to write: `in_transaction` and `GroupCommit`.

One writer at a time, on both databases: a write begins by locking the one row of `counters`
(PostgreSQL) or the database (SQLite, `BEGIN IMMEDIATE`).  So builds are never changed by two
transactions at once, ids are given out in the order they become visible, and a cursor over
event ids has no gaps.  Group commit gives back the throughput that this costs.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import unquote_to_bytes, urlsplit
from uuid import uuid4

import orjson
from sqlalchemy import Connection, Engine, create_engine, event, select
from sqlalchemy.engine import URL, Dialect, ExceptionContext, make_url
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import QueuePool

from webhook_app import bulk, deadline, models, postgres
from webhook_app.write_queue import WriteQueue

Argument = TypeVar("Argument")
Result = TypeVar("Result")

LOST_RACES = {"40001", "40P01"}
"""PostgreSQL's serialization_failure and deadlock_detected: the whole unit is repeated."""

LACKS = {"42P01", "42703"}
"""PostgreSQL's undefined_table and undefined_column."""

TRIES = 5

PROBE_BYTES = 16 * 1024
"""More than the room that a page has left: whether the database may still grow shows as well."""

BUSY_SECONDS = 30.0
RECEPTION_BUSY_SECONDS = 3.0
"""How long a transaction waits for SQLite's lock once it has its turn.  A push that waited for a group
before its own is answered in 10 s; a worker that gave up would send again what it can't note."""

UNAVAILABLE = (OperationalError, InterfaceError, InternalError, ProgrammingError, PoolTimeout)
"""Away, locked, read-only (InternalError) or without our tables (ProgrammingError): nothing can be stored."""

CONNECTIONS = 4
"""To PostgreSQL, of one process at most: small plans allow 20 in all.  Who finds none waits in line."""


CROWD = 4
PATIENCE_SECONDS = 0.002
MOST_PATIENCE_SECONDS = 0.01
"""Group commit: from this size on a group waits for company, this long for the next, and so long in all."""


class StoreUnavailable(Exception):
    """The database does not answer or can't be written; nothing of the unit was stored.

    `plain`: what is wrong, in words that hold no address, no path and no secret.
    """

    def __init__(self, reason: str, plain: str = "") -> None:
        super().__init__(f"{plain}: {reason}" if plain else reason)
        self.plain = plain or "the database does not answer"

    def in_full(self) -> str:
        """What is wrong, and what the database said."""
        return str(self) if str(self).startswith(self.plain) else f"{self.plain}: {self}"


class SchemaMissing(StoreUnavailable):
    """The database answers, but has not our tables, or not as this program knows them."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.plain = "the schema is not current"


def connect(
    url: str,
    synchronous: str = "FULL",
    pool_size: int = 16,
    busy_seconds: float = BUSY_SECONDS,
    connections: int = CONNECTIONS,
    pooler: bool | None = None,
) -> Engine:
    """An engine for `url`; opens nothing yet.

    `synchronous` is SQLite's pragma: FULL survives a power cut, NORMAL a killed process.  `pool_size` and
    `busy_seconds` are SQLite's: how long a transaction waits for its lock.  `connections`: to PostgreSQL at
    most.  `pooler`: is PostgreSQL behind one?  None: find out.
    """
    if url.startswith("sqlite"):
        engine = create_engine(
            url,
            json_serializer=_dump,
            json_deserializer=orjson.loads,
            hide_parameters=True,  # errors are logged, and what is stored is not for the log
            poolclass=QueuePool,
            pool_use_lifo=True,
            pool_size=pool_size,
            max_overflow=pool_size,
            connect_args={"timeout": busy_seconds, "check_same_thread": False},
            execution_options={"write_queue": _write_queue(url), "busy_seconds": busy_seconds},
        )
        _prepare_sqlite(engine, synchronous)
        return engine
    return _connect_postgres(url, connections, pooler)


def spare(engine: Engine) -> Engine:
    """An engine with one connection of its own to the same PostgreSQL, for what must not wait for others.

    SQLite's connections are not counted: there it is the same engine.
    """
    dialect = engine.dialect
    if not isinstance(dialect, postgres.Dialect):
        return engine
    return _connect_postgres(engine.url.render_as_string(hide_password=False), 1, dialect.pooled)


def _connect_postgres(url: str, connections: int, pooler: bool | None) -> Engine:
    engine = create_engine(
        make_url(url).set(drivername="postgresql+relay"),
        json_serializer=_dump,
        json_deserializer=orjson.loads,
        hide_parameters=True,
        pool_size=connections,
        max_overflow=0,
        pool_timeout=deadline.UNIT_SECONDS,
        pool_recycle=1800,
        pool_pre_ping=True,  # a read is not repeated, and the database may have been restarted since
        execution_options={"connection_limit": _ConnectionLimit(connections)},
    )
    dialect = engine.dialect
    assert isinstance(dialect, postgres.Dialect)
    dialect.pooled = pooler

    @event.listens_for(engine, "begin")
    def limit(connection: Connection) -> None:
        if dialect.pooled:
            connection.exec_driver_sql(postgres.limited())

    return engine


class _ConnectionLimit:
    """Turns at the connections of an engine; reads leave one to the writers."""

    def __init__(self, connections: int) -> None:
        self.all = threading.BoundedSemaphore(connections)
        self.reads = threading.BoundedSemaphore(max(1, connections - 1))


@contextmanager
def _limited(engine: Engine, *, writing: bool, more: float | None = None) -> Iterator[None]:
    """A turn at a connection, and a deadline for the unit, or in `more` seconds, on PostgreSQL.

    Raises `StoreUnavailable` when no turn comes in time.
    """
    limit: _ConnectionLimit | None = engine.get_execution_options().get("connection_limit")
    if limit is None:
        yield
        return
    with (
        deadline.until(deadline.answer_at() if more is None else time.monotonic() + more),
        nullcontext() if writing else _slot(limit.reads),
        _slot(limit.all),
    ):
        yield


@contextmanager
def _slot(semaphore: threading.Semaphore) -> Iterator[None]:
    if not semaphore.acquire(timeout=deadline.left()):
        raise StoreUnavailable("the database is too slow: every connection was in use all the time")
    try:
        yield
    finally:
        semaphore.release()


def _write_queue(url: str) -> WriteQueue | None:
    """The order of those that write to this file of SQLite; None for a store in memory."""
    file = sqlite_file(url)
    return WriteQueue(str(file)) if file else None


def _turn(engine: Engine, first: bool) -> AbstractContextManager[None]:
    write_queue: WriteQueue | None = engine.get_execution_options().get("write_queue")
    return write_queue.turn(first) if write_queue is not None else nullcontext()


def missing_file(engine: Engine) -> str | None:
    """The file of SQLite, if it is not there: whoever opened it would make an empty store."""
    file = sqlite_file(engine.url)
    return str(file) if file and not file.exists() else None


def open_to_others(url: str | URL) -> Path | None:
    """A file of SQLite that other users of this machine may read or write."""
    file = sqlite_file(url)
    found = [Path(f"{file}{end}") for end in ("", "-wal", "-shm")] if file else []
    return next((one for one in found if one.exists() and one.stat().st_mode & 0o077), None)


def sqlite_file(url: str | URL) -> Path | None:
    """The file of a SQLite store, also where the URL holds a SQLite URI; None for PostgreSQL."""
    made = make_url(url)
    if made.get_backend_name() != "sqlite" or made.database in (None, "", ":memory:"):
        return None
    if "uri" not in made.query:
        return Path(made.database)
    if made.query.get("mode") == "memory":
        return None
    return Path(os.fsdecode(unquote_to_bytes(urlsplit(made.database).path)))


def _dump(value: Any) -> str:
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS).decode()


def _prepare_sqlite(engine: Engine, synchronous: str) -> None:
    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # BEGIN is ours, see below
        for pragma in (
            "journal_mode=WAL",
            f"synchronous={synchronous}",
            "foreign_keys=ON",
            "cache_size=-16000",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "do_connect")
    def keep_private(*_: Any) -> None:
        if (file := sqlite_file(engine.url)) and "mode" not in engine.url.query:
            _make_private(file)

    @event.listens_for(engine, "handle_error")
    def damaged(context: ExceptionContext) -> None:
        """A file that is no database, or a broken one, has no name in Python; to us the store is away."""
        if type(context.original_exception) is sqlite3.DatabaseError:
            raise OperationalError(
                context.statement, context.parameters, context.original_exception
            ) from context.original_exception

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writing = connection.get_execution_options().get("writing")
        if writing:
            busy: float = engine.get_execution_options()["busy_seconds"]
            connection.exec_driver_sql(f"PRAGMA busy_timeout={deadline.cap(busy) * 1000:.0f}")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _make_private(file: Path) -> None:
    """Make the file of a new store for its owner alone, whatever the umask; -wal and -shm get that mode."""
    with suppress(OSError):  # it is there, and stays as it is; or SQLite says what is wrong
        made = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.fchmod(made, 0o600)
        os.close(made)


@contextmanager
def reading(engine: Engine, seconds: float | None = None) -> Iterator[Connection]:
    """A connection for reads: one snapshot; `StoreUnavailable` when the store is away.

    `seconds`: it may take so long, for what counts millions of rows; else as long as any unit.
    """
    try:
        with _limited(engine, writing=False, more=seconds), engine.connect() as connection:
            if seconds is not None and connection.dialect.name == "postgresql":
                connection.exec_driver_sql(postgres.limited({"statement_timeout": f"{seconds:.0f}s"}))
            yield connection
    except UNAVAILABLE as error:
        raise unavailable(error) from error


def in_transaction(engine: Engine, unit: Callable[[Connection], Result], *, first: bool = False) -> Result:
    """Run `unit` in one write transaction and commit; repeat the whole unit after a lost race.

    The unit must have no other effect than on its connection, or by `after_commit`.  `first`: before
    those that are not, where writers take turns (`write_queue`).  Raises `StoreUnavailable` when the store
    can't be reached or stays locked.
    """
    with _limited(engine, writing=True):
        return _in_transaction(engine, unit, first)


def _in_transaction(engine: Engine, unit: Callable[[Connection], Result], first: bool) -> Result:
    began = time.monotonic()
    for tried in range(1, TRIES + 1):
        later: list[Callable[[], object]] = []
        options = {"writing": True, "after_commit": later}
        try:
            with (
                _turn(engine, first),
                engine.connect().execution_options(**options) as connection,
                connection.begin(),
            ):
                result = unit(connection)
        except UNAVAILABLE as error:
            spent = time.monotonic() - began
            if tried == TRIES or not _worth_repeating(error, spent) or not deadline.left():
                raise unavailable(error) from error
            time.sleep(min(0.01 * 2**tried, deadline.left()))
        else:
            for effect in later:
                effect()
            return result
    raise AssertionError("unreachable")


def after_commit(connection: Connection, effect: Callable[[], object]) -> None:
    """Run `effect` once, when the transaction of `in_transaction` is stored: never for one that was undone.

    It must not raise.
    """
    later: list[Callable[[], object]] = connection.get_execution_options()["after_commit"]
    later.append(effect)


def _worth_repeating(error: Exception, seconds: float) -> bool:
    """A lost race, or a connection or server that was lost: another one may be there already.

    Not a lock that was waited for already; `seconds`: since the first try.
    """
    if not isinstance(error, DBAPIError):
        return False
    if error.connection_invalidated:
        return True
    state = getattr(error.orig, "sqlstate", None)
    return state in LOST_RACES or ("locked" in str(error.orig) and seconds < RECEPTION_BUSY_SECONDS)


def unavailable(error: Exception) -> StoreUnavailable:
    """What one of `UNAVAILABLE` means, in one line."""
    original = getattr(error, "orig", None) or error
    reason = str(original).strip().split("\n")[0]
    lacks = getattr(original, "sqlstate", None) in LACKS or reason.startswith(
        ("no such table", "no such column")
    )
    return SchemaMissing(reason) if lacks else StoreUnavailable(reason, _plain(original))


_PLAIN = {
    "SQLITE_FULL": "the disk is full",
    "SQLITE_IOERR": "the disk can't be written",
    "SQLITE_READONLY": "the database is read-only",
    "SQLITE_BUSY": "the database is locked by another process",
    "53100": "the disk of the database is full",
    "53200": "the database is out of memory",
    "53300": "the database has no connection left",
    "25006": "the database is read-only",
}
"""By SQLite's name of an error (its extended ones begin with it) or PostgreSQL's SQLSTATE."""


def _plain(error: object) -> str:
    name = getattr(error, "sqlite_errorname", None) or getattr(error, "sqlstate", None) or ""
    return next((plain for known, plain in _PLAIN.items() if name.startswith(known)), "")


@dataclass(slots=True)
class Write:
    """An open write transaction that holds the writer's lock, with the ids it has given out."""

    connection: Connection
    last: dict[str, int]
    _given: set[str] = field(default_factory=set)

    def new_id(self, table: str) -> int:
        """The next id of `table`; ids become visible in the order they are given."""
        self.last[table] += 1
        self._given.add(table)
        return self.last[table]

    def new_ids(self, table: str, count: int) -> int:
        """Give out so many ids of `table` in a row; the first of them."""
        first = self.new_id(table)
        self.last[table] += count - 1
        return first

    def gave(self, table: str) -> bool:
        """Did this transaction give out an id of `table`?"""
        return table in self._given

    def finish(self) -> None:
        """Store the ids given out; called once, last."""
        if self._given:
            bulk.update(self.connection, models.counters, [self.last])


_COUNTERS = tuple(models.counters.c.keys())
_LOCK_COUNTERS = select(models.counters).where(models.counters.c.id == 1).with_for_update()


@lru_cache
def _lock_counters(dialect: Dialect) -> str:
    return str(_LOCK_COUNTERS.compile(dialect=dialect, compile_kwargs={"literal_binds": True}))


def as_writer(engine: Engine, unit: Callable[[Write], Result], *, first: bool = False) -> Result:
    """`in_transaction`, as the one writer."""

    def locked(connection: Connection) -> Result:
        (last,) = bulk.fetch(connection, _lock_counters(connection.dialect))
        write = Write(connection, dict(zip(_COUNTERS, last, strict=True)))
        result = unit(write)
        write.finish()
        return result

    return in_transaction(engine, locked, first=first)


def try_write(engine: Engine) -> None:
    """Do what each push does, and leave no trace: as the writer, write a row that takes room, and commit.

    A full disk and a database that is read-only show only then.  SQLite writes no page that is as before,
    so the row is made and removed.  Raises `StoreUnavailable`.
    """
    mine = models.workers.c.id == (name := f"probe:{uuid4()}")
    row = {"id": name, "alive_at": datetime.now(UTC), "claimed": ["x" * PROBE_BYTES]}

    def write(write: Write) -> None:
        write.connection.execute(models.workers.insert(), row)
        write.connection.execute(models.workers.delete().where(mine))

    as_writer(engine, write, first=True)


class GroupCommit(Generic[Argument, Result]):
    """Run what several threads bring at the same time as one unit: one transaction, one sync.

    The first thread to come runs at once; what arrives meanwhile goes together in the next run.  Only
    under load, when groups were large, a leader waits a few milliseconds for those that keep coming.
    A unit that fails with company is repeated alone for each, so a bad argument costs only itself.
    `after` is told the results once nobody waits for them any more; it must not raise.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Argument]], Sequence[Result]],
        after: Callable[[Sequence[Result]], object] = len,
        most: int = 64,
    ) -> None:
        self._run = run
        self._after = after
        self._most = most
        self._mutex = threading.Lock()
        self._waiting: list[_Seat[Argument, Result]] = []
        self._led = False
        self._company = threading.Condition(self._mutex)
        self._expected = 1

    def __call__(self, argument: Argument) -> Result:
        """The result for `argument` once its transaction is committed; raises what the unit raised.

        Raises `StoreUnavailable` too when it could not begin in time.
        """
        seat: _Seat[Argument, Result] = _Seat(argument)
        with self._mutex:
            self._waiting.append(seat)
            leads = not self._led
            self._led = True
            if len(self._waiting) >= self._expected:
                self._company.notify()
        if not leads:
            self._await_turn(seat)
        if not seat.done:
            self._lead()
        if seat.error is not None:
            raise seat.error
        return seat.result  # type: ignore[return-value]

    def _await_turn(self, seat: "_Seat[Argument, Result]") -> None:
        """Until it is done, or it is this thread's turn to lead; one that came too late leaves the line."""
        if seat.call.acquire(timeout=max(0.0, seat.until - time.monotonic())):
            return
        with self._mutex:
            if seat in self._waiting and not seat.call.acquire(blocking=False):
                self._waiting.remove(seat)
                seat.fail(_too_late())
                return
        if seat not in self._waiting and not seat.done:
            seat.call.acquire()  # it is being served, by the deadline of its group

    def _lead(self) -> None:
        """Run one group, the leader's own seat first in it, and hand the lead on."""
        with self._mutex:
            self._await_company()
            seats = self._waiting[: self._most]
            del self._waiting[: self._most]
            self._expected = max(len(seats), self._expected * 3 // 4)
        try:
            self._serve_in_time(seats)
        finally:
            with self._mutex:
                self._led = bool(self._waiting)
                if self._waiting:
                    self._waiting[0].call.release()
            for seat in seats[1:]:
                seat.call.release()
        self._after([seat.result for seat in seats if seat.error is None])  # type: ignore[misc]

    def _await_company(self) -> None:
        """Under load, let those come who came lately, as long as they keep coming.

        After a large group its members are about to bring their next arguments; a leader that runs at
        once would run alone, and then with all of them, by turns.  A lone one never waits.
        """
        if self._expected < CROWD:
            return
        seen, until = 0, time.monotonic() + MOST_PATIENCE_SECONDS
        while seen < len(self._waiting) < self._expected and time.monotonic() < until:
            seen = len(self._waiting)
            self._company.wait(PATIENCE_SECONDS)

    def _serve_in_time(self, seats: "list[_Seat[Argument, Result]]") -> None:
        """Serve those that are not late already, by the time when the first of them must be answered."""
        now = time.monotonic()
        for seat in seats:
            if seat.until <= now + LEAST_SECONDS:
                seat.fail(_too_late())
        if live := [seat for seat in seats if not seat.done]:
            with deadline.until(min(seat.until for seat in live)):
                self._serve(live)

    def _serve(self, seats: "list[_Seat[Argument, Result]]") -> None:
        try:
            results = self._run([seat.argument for seat in seats])
        except StoreUnavailable as error:
            for seat in seats:
                seat.fail(error)
        except Exception as error:  # noqa: BLE001  told to whoever brought the argument
            if len(seats) == 1:
                seats[0].fail(error)
                return
            for seat in seats:
                self._serve([seat])
        else:
            for seat, result in zip(seats, results, strict=True):
                seat.finish(result)


LEAST_SECONDS = 0.5
"""With less time left than this a call is too late: its deadline would be that of its whole group."""


def _too_late() -> StoreUnavailable:
    return StoreUnavailable("the database is too slow: others waited for it all the time")


def _held() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


@dataclass(slots=True, eq=False)
class _Seat(Generic[Argument, Result]):
    argument: Argument
    call: threading.Lock = field(default_factory=_held)
    until: float = field(default_factory=deadline.answer_at)
    done: bool = False
    result: Result | None = None
    error: Exception | None = None

    def finish(self, result: Result) -> None:
        self.result = result
        self.done = True

    def fail(self, error: Exception) -> None:
        self.error = error
        self.done = True
