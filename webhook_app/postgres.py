"""SQLAlchemy's dialect of psycopg, made for servers that hang, fail over or stand behind a pooler.

* Everything that waits has a limit.  The server's own (`LIMITS`) frees others from a client that was cut off;
  TCP's finds a dead peer; and a thread's deadline (`webhook_app.deadline`) ends each wait here, since a proxy
  that swallows what we send acknowledges it, and looks alive to TCP.  A connection that was late is closed.
* A server that answers but can't do its work (`GONE`) counts as a lost connection: SQLAlchemy then drops
  every pooled connection, and the next ones go where the address leads by then.
* Behind a pooler that gives each transaction any server connection (PgBouncer) there are no prepared
  statements and no start-up options; each transaction sets its own limits.

Sources: https://www.postgresql.org/docs/current/runtime-config-client.html,
https://www.postgresql.org/docs/current/libpq-connect.html, https://www.pgbouncer.org/features.html
"""

import logging
import threading
import time
from collections.abc import Mapping
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.rows import TupleRow
from sqlalchemy import URL
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

from webhook_app import deadline

Result = TypeVar("Result")

log = logging.getLogger(__name__)

LIMITS: Mapping[str, str] = {
    "statement_timeout": "7s",
    "lock_timeout": "6500ms",
    "idle_in_transaction_session_timeout": "5s",
}
"""The server's: a unit ends by its deadline before, unless its client was cut off."""

UNLIMITED: Mapping[str, str] = {
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "1min",
}
"""For a migration, which takes as long as the tables are large."""

KEEPALIVES: Mapping[str, str] = {
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
}
"""The server's: the connections of a machine that was cut off count no longer after a minute."""

CONNECTING: Mapping[str, Any] = {
    "connect_timeout": 3,
    "tcp_user_timeout": 5000,
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
}
"""Ours, of each connection; `DATABASE_URL` may say otherwise (`?connect_timeout=5`)."""

PING_SECONDS = 2.0

GONE = {
    "25006",  # read_only_sql_transaction: demoted, or never writable
    "25P03",  # idle_in_transaction_session_timeout
    "57P01",  # admin_shutdown
    "57P02",  # crash_shutdown
    "57P03",  # cannot_connect_now
    "57P05",  # idle_session_timeout
}
"""With the class 08 (connection exceptions): no connection of this server is of use any more."""


class Connection(psycopg.Connection[TupleRow]):
    """psycopg's, with an end to each wait."""

    def wait(self, gen: PQGen[Result], interval: float = 0.1, timeout: float | None = None) -> Result:
        """Wait for the server until the thread's deadline; a connection that was late is closed."""
        left = deadline.left()
        ends = left if timeout is None else min(timeout, left)
        if ends == float("inf"):
            return super().wait(gen, interval)
        until = time.monotonic() + ends
        try:
            return super().wait(gen, interval, ends)
        except psycopg.OperationalError as error:
            if error.sqlstate is not None or time.monotonic() < until or self.closed:
                raise
            self.close()
            raise psycopg.OperationalError(f"the database did not answer within {ends:.1f} s") from error


class Dialect(PGDialect_psycopg):
    """See the module.  `pooled`: does a pooler stand before the server?  None: that is not known yet."""

    driver = "relay"
    supports_statement_cache = True
    pooled: bool | None = None

    def create_connect_args(self, url: URL) -> Any:
        """As psycopg wants them; of several hosts the one that can be written."""
        args, given = super().create_connect_args(url)  # type: ignore[no-untyped-call]
        several = {"target_session_attrs": "read-write"} if "," in str(given.get("host", "")) else {}
        return args, {**CONNECTING, **several, **given}

    def connect(self, *args: Any, **given: Any) -> Any:
        """A connection, by the deadline.

        It is made in a thread of its own: looking up a name has no limit, and several hosts have one each.
        """
        made: SimpleQueue[Connection | Exception] = SimpleQueue()
        abandoned = threading.Event()

        def open_one() -> None:
            try:
                made.put(self._open(args, given))
            except Exception as error:  # noqa: BLE001  told to whoever waits
                made.put(error)
            if abandoned.is_set():
                _close_late(made)

        threading.Thread(target=open_one, name="connect", daemon=True).start()
        left = deadline.left()
        try:
            found = made.get(timeout=None if left == float("inf") else left)
        except Empty:
            abandoned.set()
            _close_late(made)
            raise psycopg.OperationalError(f"no connection to the database within {left:.1f} s") from None
        if isinstance(found, Exception):
            raise found
        return found

    def _open(self, args: tuple[Any, ...], given: Mapping[str, Any]) -> Connection:
        """Open one as the server wants it, and see whether that is a pooler."""
        if not self.pooled:
            try:
                connection = Connection.connect(*args, **(dict(given) | {"options": _options(given)}))
            except psycopg.OperationalError as error:
                if self.pooled is False or not _refuses_options(error):
                    raise
            else:
                if self.pooled is False or not _is_pooled(connection, "options" in given):
                    return connection
                connection.close()
            log.info("the database is behind a pooler: no prepared statements, no session state")
            self.pooled = True
        return Connection.connect(*args, **(dict(given) | {"prepare_threshold": None}))

    def is_disconnect(self, e: Any, connection: Any, cursor: Any) -> bool:
        """Is this connection lost, or its server of no use?"""
        state = getattr(e, "sqlstate", None) or ""
        if state in GONE or state.startswith("08"):
            return True
        return bool(super().is_disconnect(e, connection, cursor))  # type: ignore[no-untyped-call]

    def do_ping(self, dbapi_connection: Any) -> bool:
        """Does it answer soon, and can it be written?"""
        with deadline.until(time.monotonic() + PING_SECONDS):
            dbapi_connection.autocommit = True
            try:
                (state,) = dbapi_connection.execute("SHOW transaction_read_only").fetchone()
            finally:
                if not dbapi_connection.closed:
                    dbapi_connection.autocommit = False
        return bool(state == "off")


def limited(limits: Mapping[str, str] = LIMITS) -> str:
    """The statement that sets the limits of one transaction."""
    return "SELECT " + ", ".join(f"set_config('{name}', '{value}', true)" for name, value in limits.items())


def _close_late(made: "SimpleQueue[Connection | Exception]") -> None:
    """Close the connection that came when nobody waited any more."""
    while not made.empty():
        late = made.get()
        if isinstance(late, Connection):
            late.close()


def _options(given: Mapping[str, Any]) -> str:
    ours = {"timezone": "utc", **LIMITS, **KEEPALIVES}
    return " ".join([*(f"-c {name}={value}" for name, value in ours.items()), given.get("options", "")])


def _refuses_options(error: psycopg.OperationalError) -> bool:
    """PgBouncer names the start-up parameter, Amazon's proxy the command-line options."""
    return any(words in str(error) for words in ("startup parameter", "command-line options"))


def _is_pooled(connection: Connection, has_own_options: bool) -> bool:
    """Is the session not held by the process that greeted us, or not set up as asked?

    A pooler makes up the process id that it tells a client at the start, and may swallow the options.
    """
    connection.autocommit = True
    row = connection.execute("SELECT pg_backend_pid(), current_setting('lock_timeout')").fetchone()
    connection.autocommit = False
    process, limit = row or (None, None)
    swallowed = limit != LIMITS["lock_timeout"] and not has_own_options
    return process != connection.info.backend_pid or swallowed


registry.register("postgresql.relay", __name__, "Dialect")
