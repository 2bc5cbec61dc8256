"""Fan-out: what one push costs whose event goes to 10 000 subscribers without filters."""

import tempfile
import time
from pathlib import Path

from bench import recording, servers
from bench.table import Row, measured
from tests.facts import PACE
from webhook_app import db

PART = "fanout"
SUBSCRIBERS, TIMES = 10_000, 20
GOAL_MS = 200.0


def run() -> list[Row]:
    """On SQLite and on PostgreSQL, the first push after a change of subscribers apart."""
    with tempfile.TemporaryDirectory(prefix="buildrelay-bench-") as name:
        rows = _measure("SQLite", f"sqlite:///{Path(name) / 'fanout.db'}")
    with servers.postgresql() as (url, _):
        return rows + _measure("PostgreSQL", url)


def _measure(store: str, url: str) -> list[Row]:
    servers.prepare(url)
    engine = db.connect(url)
    recording.subscribe(engine, [f"https://{number}.example.com/" for number in range(SUBSCRIBERS)])

    def push() -> float:
        began = time.perf_counter()
        recording.record(engine, 1, PACE)
        return (time.perf_counter() - began) * 1000

    first, times = push(), [push() for _ in range(TIMES)]
    engine.dispose()
    what = f"{store}: a push with {SUBSCRIBERS} subscribers"
    return [
        measured(PART, f"{what}, median of {TIMES}", times, "{:.0f} ms", most=GOAL_MS),
        Row(PART, f"{what}, the first after one of them changed", f"{first:.0f} ms"),
    ]
