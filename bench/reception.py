"""Reception: requests per second of one web process on one core, as a share of bare Flask's; and its p99."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median

from sqlalchemy import func, select

from bench import load, machine, pushes, servers
from bench.table import Row, measured
from webhook_app import db, models

PART = "reception"
ROUNDS = 5
CONNECTIONS = 32
PLAIN_REQUESTS = 3000
REQUESTS = 1500
WARM_UP = 300
OPEN_SECONDS = 5.0
OPEN_CONNECTIONS = 128
OPEN_SHARE = 0.8


@dataclass(slots=True)
class _Store:
    """A web process over one kind of store, and what was measured of it."""

    name: str
    url: str
    goal: float
    pids: list[int]
    port: int
    requests: Iterator[bytes]
    sent: int = 0
    rates: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    tails: list[float] = field(default_factory=list)

    def drive(self, count: int, connections: int, due: list[float] | None = None) -> load.Run:
        requests = pushes.some(self.requests, count)
        self.sent += count
        return load.drive(self.port, requests, connections, b'"accepted"', due)


def run() -> list[Row]:
    """All stores in turn, each time right after bare Flask."""
    web_core, load_core = machine.cores()
    with tempfile.TemporaryDirectory(prefix="buildrelay-bench-") as name, ExitStack() as stack:
        directory = Path(name)
        stack.enter_context(machine.on_core(load_core))
        redis_url = stack.enter_context(servers.redis(directory))
        with machine.on_core(web_core):
            plain, port = stack.enter_context(_plain(directory))
            stores = [
                _start(stack, directory, redis_url, "SQLite, FULL", "FULL", 0.45),
                _start(stack, directory, redis_url, "SQLite, NORMAL", "NORMAL", 0.45),
                _start_postgresql(stack, directory, redis_url),
            ]
        yardstick = _Yardstick(port, machine.family(plain)[1:])
        yardstick.drive(WARM_UP)
        for store in stores:
            store.drive(WARM_UP, CONNECTIONS)
            store.pids = [pid for parent in store.pids for pid in machine.family(parent)]
        for _ in range(ROUNDS):
            for store in stores:
                _compare(yardstick, store)
        for store in stores:
            _measure_tail(store)
            _check(store)
        return _rows(yardstick, stores)


@dataclass(slots=True)
class _Yardstick:
    """Bare Flask."""

    port: int
    pids: list[int]
    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    generator: list[float] = field(default_factory=list)

    def drive(self, count: int) -> load.Run:
        requests = pushes.some(pushes.stream(self.port, 0), count)
        return load.drive(self.port, requests, CONNECTIONS, b'"accepted"')


def _plain(directory: Path):
    env = machine.environment(
        GITHUB_WEBHOOK_SECRET=pushes.SECRET, BUILDRELAY_DATA_DIR=str(directory / "plain")
    )
    return servers.gunicorn("bench.plain:app", directory, env)


def _start(
    stack: ExitStack, directory: Path, redis_url: str, name: str, synchronous: str, goal: float, url: str = ""
) -> _Store:
    """A web process with one subscriber in its store.  No worker runs: messages are recorded, not sent."""
    url = url or f"sqlite:///{directory / synchronous}.db"
    servers.prepare(url, "https://example.com/callback")
    env = machine.environment(
        DATABASE_URL=url, SQLITE_SYNCHRONOUS=synchronous, REDIS_URL=redis_url, ENCRYPTION_KEYS=servers.KEY,
        GITHUB_WEBHOOK_SECRET=pushes.SECRET, BUILDRELAY_DATA_DIR=str(directory),
    )  # fmt: skip
    pid, port = stack.enter_context(servers.gunicorn("wsgi:app", directory, env))
    return _Store(name, url, goal, [pid], port, pushes.stream(port, 1))


def _start_postgresql(stack: ExitStack, directory: Path, redis_url: str) -> _Store:
    """The database server shares the core of the web process."""
    url, postmaster = stack.enter_context(servers.postgresql())
    store = _start(stack, directory, redis_url, "PostgreSQL", "FULL", 0.35, url)
    store.pids.append(postmaster)
    return store


def _compare(yardstick: _Yardstick, store: _Store) -> None:
    used = machine.cpu_seconds(yardstick.pids)
    plain = yardstick.drive(PLAIN_REQUESTS)
    yardstick.rates.append(plain.rate)
    yardstick.generator.append(plain.own_seconds / plain.seconds)
    yardstick.cpu.append((machine.cpu_seconds(yardstick.pids) - used) / PLAIN_REQUESTS * 1e6)
    used = machine.cpu_seconds(store.pids)
    ours = store.drive(REQUESTS, CONNECTIONS)
    store.rates.append(ours.rate)
    store.ratios.append(ours.rate / plain.rate)
    store.cpu.append((machine.cpu_seconds(store.pids) - used) / REQUESTS * 1e6)


def _measure_tail(store: _Store) -> None:
    """The 99th percentile at a steady share of the rate in the table, three times a third of the time."""
    rate = OPEN_SHARE * median(store.rates)
    for seed in range(3):
        due = load.arrivals(int(rate * OPEN_SECONDS / 3), rate, Random(seed))
        tail = store.drive(len(due), OPEN_CONNECTIONS, due)
        store.tails.append(tail.percentile(99) * 1000)


def _check(store: _Store) -> None:
    """Every request is in the store as a delivery, an event and a message; else the figures mean nothing."""
    engine = db.connect(store.url)
    with db.reading(engine) as connection:
        for table in (models.inbound, models.events, models.messages):
            found = connection.execute(select(func.count()).select_from(table)).scalar_one()
            if found != store.sent:
                raise RuntimeError(f"{store.name}: {store.sent} requests, {found} rows in {table.name}")
    engine.dispose()


def _rows(yardstick: _Yardstick, stores: list[_Store]) -> list[Row]:
    rows = [
        measured(PART, "bare Flask, requests/s", yardstick.rates, "{:.0f}"),
        measured(PART, "bare Flask, processor time per request", yardstick.cpu, "{:.0f} µs"),
        measured(
            PART, "the generator's share of its own core meanwhile",
            [share * 100 for share in yardstick.generator], "{:.0f} %",
        ),
    ]  # fmt: skip
    for store in stores:
        rate = f"{OPEN_SHARE:.0%} of {median(store.rates):.0f}/s"
        also = " and database" if "PostgreSQL" in store.name else ""
        rows += [
            measured(PART, f"{store.name}: requests/s", store.rates, "{:.0f}"),
            measured(PART, f"{store.name}: ratio to bare Flask", store.ratios, "{:.2f}", least=store.goal),
            measured(PART, f"{store.name}: processor time per request, web{also}", store.cpu, "{:.0f} µs"),
            measured(PART, f"{store.name}: p99 at {rate}, open loop", store.tails, "{:.0f} ms", most=100),
        ]
    return rows
