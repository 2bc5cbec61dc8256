"""Starvation: how long pushes wait while our own work writes: deliveries, a replay, a sweep, rekey, a backup.

`python -m bench.starvation` takes sizes, and another tree of the program to compare with, by turns.
"""

import argparse
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from random import Random

from cryptography.fernet import Fernet
from sqlalchemy import (
    Connection,
    Engine,
    Table,
    Text,
    cast,
    func,
    insert,
    literal,
    select,
    text,
    true,
    update,
)

from bench import load, machine, pushes, recording, servers
from bench.table import Row, measured, render
from tests import postgres
from tests.facts import PACE
from webhook_app import db, models, queues, replays, subscribers
from webhook_app.times import utc_now

PART = "starvation"
SUBSCRIBERS = 1000
PUSHES_PER_SECOND = 30.0
CONNECTIONS = 64
P99_MS, WORST_MS = 100.0, 300.0
OTHER_KEY = Fernet.generate_key().decode()
_m, _e, _s = models.messages.c, models.events.c, models.subscribers.c


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much there is: messages that wait, rows past their retention, seconds of each measurement."""

    pending: int = 160_000
    old: int = 1_000_000
    seconds: float = 8.0


@dataclass(slots=True)
class _Stand:
    """A store with a backlog, and where its processes find what they need."""

    name: str
    url: str
    redis_url: str
    directory: Path
    sizes: Sizes
    engine: Engine
    callback: str
    subscriber: str = ""
    seeds: Iterator[int] = field(default_factory=lambda: iter(range(1, 1000)))

    def environment(self, **more: str) -> dict[str, str]:
        """For web, workers and commands."""
        env = servers.worker_environment(self.url, self.redis_url, self.directory)
        return env | {"SQLITE_SYNCHRONOUS": "FULL", "GITHUB_WEBHOOK_SECRET": pushes.SECRET, **more}


@dataclass(frozen=True, slots=True)
class _Found:
    run: load.Run
    done_per_second: float


def run(
    sizes: Sizes = Sizes(), stores: Sequence[str] = ("SQLite", "PostgreSQL"), works: Sequence[str] = (),
    other: Path | None = None,
) -> list[Row]:  # fmt: skip
    """Each kind of work on each store; with another tree, its processes first and then ours."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="buildrelay-bench-") as name, ExitStack() as stack:
        directory = Path(name)
        redis_url = stack.enter_context(servers.redis(directory))
        callback = stack.enter_context(servers.receiver(0.0, directory))
        for store in stores:
            url = f"sqlite:///{directory}/starvation.db"
            if store == "PostgreSQL":
                url, _ = stack.enter_context(servers.postgresql())
            stand = _Stand(store, url, redis_url, directory, sizes, db.connect(url, "NORMAL"), callback)
            _fill(stand)
            for work in works or WORKS:
                rows += _rows(stand, work, _measure(stand, work, other))
            stand.engine.dispose()
    return rows


def _measure(stand: _Stand, work: str, other: Path | None) -> dict[str, _Found]:
    found, own = {}, machine.ROOT
    for tree in (other, own) if other else (own,):
        machine.ROOT = tree
        try:
            found["" if tree == own else "before"] = _beside(stand, work)
        finally:
            machine.ROOT = own
    return found


def _beside(stand: _Stand, work: str) -> _Found:
    """Pushes at random times to a web process, while the work goes on."""
    sizes, env = stand.sizes, stand.environment()
    due = load.arrivals(int(PUSHES_PER_SECOND * sizes.seconds), PUSHES_PER_SECOND, Random(1))
    with servers.gunicorn("wsgi:app", stand.directory, env) as (_, port):
        requests = pushes.some(pushes.stream(port, next(stand.seeds)), len(due) + 20)
        load.drive(port, requests[:20], 4, b'"accepted"')
        with WORKS[work](stand) as count:
            before = count()
            driven = load.drive(port, requests[20:], CONNECTIONS, b'"accepted"', due)
            return _Found(driven, (count() - before) / driven.seconds)


# ---- the store -----------------------------------------------------------------------------------


def _fill(stand: _Stand) -> None:
    """Subscribers, of which the first has a backlog; and rows that the sweep is to delete."""
    servers.prepare(stand.url)
    engine, sizes = stand.engine, stand.sizes
    (stand.subscriber,) = recording.subscribe(engine, [stand.callback])
    others = [f"https://{number}.example.com/" for number in range(SUBSCRIBERS - 1)]
    recording.subscribe(engine, others, sources=["elsewhere"])
    recording.record(engine, 1, PACE)
    with engine.connect().execution_options(writing=True) as connection, connection.begin():
        _multiply_messages(connection, sizes.pending, old=False)
        _multiply_messages(connection, sizes.old // 4, old=True)
        _add_inbound(connection, sizes.old // 2)
        most = {table.name: _highest(connection, table) for table in _COUNTED}
        connection.execute(update(models.counters).values(**most))
        if engine.dialect.name == "postgresql":
            connection.execute(text("ANALYZE"))  # as its autovacuum does


_COUNTED = (models.builds, models.events, models.messages, models.inbound)


def _highest(connection: Connection, table: Table) -> int:
    return connection.execute(select(func.max(table.c.id))).scalar_one()


def _numbers(count: int):
    step = select(literal(2).label("number")).cte("numbers", recursive=True)
    return step.union_all(select(step.c.number + 1).where(step.c.number < count))


def _multiply_messages(connection: Connection, count: int, *, old: bool) -> None:
    """The first build, its event and its message, so many times; old ones are delivered, of no build."""
    numbers, moment = _numbers(count), utc_now() - timedelta(days=400)
    number = numbers.c.number + (10_000_000 if old else 0)
    word = cast(number, Text)
    if not old:
        _multiply(connection, models.builds, numbers, id=number, key=literal("github:n") + word,
                  lookup=literal("n") + word, build_id=literal("github:o:r:n") + word, number=number,
                  next_poll_at=literal(None))  # fmt: skip
    build = literal(None) if old else number
    more = {"sequence": literal(None), "timestamp": literal(moment, _e.timestamp.type)} if old else {}
    _multiply(connection, models.events, numbers, id=number, build=build, **more)
    delivered = {"sequence": literal(None), "state": literal("delivered"), "due_at": literal(None)}
    _multiply(connection, models.messages, numbers, id=number, event=number, build=build,
              message_id=literal("msg_") + word, **(delivered if old else {}))  # fmt: skip


def _multiply(connection: Connection, table: Table, numbers, **changed) -> None:
    columns = [changed.get(column.name, column).label(column.name) for column in table.c]
    first = select(func.min(table.c.id)).scalar_subquery()
    rows = select(*columns).select_from(table.join(numbers, true())).where(table.c.id == first)
    connection.execute(insert(table).from_select(list(table.c.keys()), rows))


def _add_inbound(connection: Connection, count: int) -> None:
    moment = utc_now() - timedelta(days=400)
    first = {
        "id": 1, "delivery_key": "k1", "source": "github", "hook_id": "1", "event": "workflow_run",
        "delivery_id": "1", "headers": {}, "body": bytes(500), "status": "applied", "received_at": moment,
    }  # fmt: skip
    connection.execute(insert(models.inbound), first)
    numbers = _numbers(count)
    _multiply(connection, models.inbound, numbers, id=numbers.c.number,
              delivery_key=literal("k") + cast(numbers.c.number, Text))  # fmt: skip


def _put_back(stand: _Stand, state: str, url: str) -> None:
    """The backlog as it was, for an endpoint at this URL."""
    due = utc_now() if state == "pending" else None
    values = {"state": state, "due_at": due, "attempts": 0, "claim": None, "reason": None}
    healthy = {key: value for key, value in subscribers.CLEAN_RECORD.items() if key in _s}
    of_it = (_m.subscriber == stand.subscriber) & (_m.id < 10_000_000)
    with stand.engine.connect().execution_options(writing=True) as connection, connection.begin():
        connection.execute(update(models.messages).where(of_it).values(**values))
        connection.execute(
            update(models.subscribers).where(_s.id == stand.subscriber).values(url=url, **healthy)
        )


def _count(stand: _Stand, statement) -> int:
    with db.reading(stand.engine) as connection:
        return connection.execute(statement).scalar_one()


# ---- kinds of work -------------------------------------------------------------------------------


@contextmanager
def _nothing(_stand: _Stand) -> Iterator[Callable[[], int]]:
    yield lambda: 0


@contextmanager
def _draining(stand: _Stand, *, dead: bool) -> Iterator[Callable[[], int]]:
    """The deliver worker with its backlog; tries that were noted."""
    url = f"http://127.0.0.1:{machine.free_port()}/" if dead else stand.callback
    _put_back(stand, "pending", url)
    tries = select(func.count()).select_from(models.delivery_attempts)
    with _working(stand, queues.DELIVER):
        before = _count(stand, tries)
        machine.wait_until(lambda: _count(stand, tries) > before, "the first tries")
        yield lambda: _count(stand, tries)


@contextmanager
def _replaying(stand: _Stand) -> Iterator[Callable[[], int]]:
    _put_back(stand, "delivered", stand.callback)
    made_due = select(func.count()).select_from(models.messages).where(_m.state == "pending")
    with db.reading(stand.engine) as connection:
        subscriber = subscribers.get(connection, stand.subscriber)
    now = utc_now()
    wanted = replays.Range(now - timedelta(days=1), now + timedelta(days=1), only_missing=False)
    replays.replay(stand.engine, subscriber, wanted, now)
    with _working(stand, queues.REPLAY):
        yield lambda: _count(stand, made_due)


@contextmanager
def _sweeping(stand: _Stand) -> Iterator[Callable[[], int]]:
    left = [
        select(func.count()).select_from(models.inbound),
        select(func.count()).select_from(models.events).where(_e.id > 10_000_000),
    ]
    with _working(stand, queues.SWEEP):
        yield lambda: -sum(_count(stand, statement) for statement in left)


@contextmanager
def _working(stand: _Stand, name: str) -> Iterator[None]:
    """A worker that serves this queue, which is called again and again."""
    redis = queues.connect(stand.redis_url)
    ring = partial(queues.enqueue_once, redis, name)
    with servers.worker(stand.environment(), stand.directory, name), _again(ring, 0.2):
        yield


@contextmanager
def _rekeying(stand: _Stand) -> Iterator[Callable[[], int]]:
    """`buildrelay rekey`, to another key and back; how often."""
    keys = [f"{OTHER_KEY},{servers.KEY}", f"{servers.KEY},{OTHER_KEY}"]
    done: list[int] = []

    def rekey() -> None:
        env = stand.environment(ENCRYPTION_KEYS=keys[len(done) % 2])
        _run([servers.PYTHON, "-m", "webhook_app", "rekey"], env)
        done.append(1)

    with _again(rekey, 0.0):
        yield lambda: len(done)


@contextmanager
def _backing_up(stand: _Stand) -> Iterator[Callable[[], int]]:
    """As `docs/operations.md` tells to; how often."""
    done: list[int] = []

    def back_up() -> None:
        target = stand.directory / f"backup{len(done)}"
        if stand.engine.dialect.name == "sqlite":
            file = str(stand.engine.url.database)
            _run([servers.PYTHON, "-c", _VACUUM, file, str(target)], machine.environment())
        else:
            where = str(stand.engine.url.query["host"])
            dump = [str(postgres.binaries() / "pg_dump"), "-h", where, "-U", "postgres", "-f", str(target)]
            _run([*dump, "postgres"], machine.environment())
        target.unlink()
        done.append(1)

    with _again(back_up, 0.0):
        yield lambda: len(done)


_VACUUM = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('VACUUM INTO ?', sys.argv[2:])"


def _run(argv: Sequence[str], env: Mapping[str, str]) -> None:
    subprocess.run(argv, env=dict(env), cwd=machine.ROOT, check=True, capture_output=True)


@contextmanager
def _again(do: Callable[[], object], pause_seconds: float) -> Iterator[None]:
    """Do it in a thread, again and again."""
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            do()
            over.wait(pause_seconds)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


WORKS: dict[str, Callable[[_Stand], object]] = {
    "nothing": _nothing,
    "draining": partial(_draining, dead=False),
    "dead": partial(_draining, dead=True),
    "replay": _replaying,
    "sweep": _sweeping,
    "rekey": _rekeying,
    "backup": _backing_up,
}
_UNITS = {
    "draining": "tries",
    "dead": "tries",
    "replay": "messages",
    "sweep": "rows",
    "rekey": "runs",
    "backup": "runs",
}


# ---- the table -----------------------------------------------------------------------------------


def _rows(stand: _Stand, work: str, found: Mapping[str, _Found]) -> list[Row]:
    rows = []
    for tree, one in found.items():
        name = f"{stand.name}, {work}{', ' + tree if tree else ''}"
        p99, worst = one.run.percentile(99) * 1000, max(one.run.latencies) * 1000
        middle = one.run.percentile(50) * 1000
        rows.append(measured(PART, f"{name}: push, median", [middle], "{:.0f} ms"))
        rows.append(measured(PART, f"{name}: push, p99", [p99], "{:.0f} ms", most=P99_MS))
        rows.append(measured(PART, f"{name}: push, worst", [worst], "{:.0f} ms", most=WORST_MS))
        if work in _UNITS:
            rows.append(measured(PART, f"{name}: {_UNITS[work]}/s", [one.done_per_second], "{:.1f}"))
    print(*(f"{row.what}: {row.figure}" for row in rows), sep="\n", flush=True)
    return rows


def main() -> None:
    """One run of given sizes."""
    parser = argparse.ArgumentParser(prog="python -m bench.starvation", description=__doc__)
    parser.add_argument("--pending", type=int, default=160_000)
    parser.add_argument("--old", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--store", action="append", choices=("SQLite", "PostgreSQL"))
    parser.add_argument("--work", action="append", choices=tuple(WORKS))
    parser.add_argument("--other", type=Path, help="the root of another tree of the program")
    given = parser.parse_args()
    sizes = Sizes(given.pending, given.old, given.seconds)
    print(render(run(sizes, given.store or ("SQLite", "PostgreSQL"), given.work or (), given.other)))


if __name__ == "__main__":
    main()
