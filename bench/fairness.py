"""Fairness: what one subscriber of 20 that hangs for the full timeout costs the other 19."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Engine, func, select

from bench import machine, recording, servers
from bench.table import Row, measured
from tests.facts import PACE
from webhook_app import db, models, queues

PART = "fairness"
TIMES = 3
SUBSCRIBERS = 20
BACKLOG_EVENTS = 150
PACED_EVENTS, PACED_PER_SECOND = 120, 30
HANG_SECONDS = 3600.0
MOST_LOSS, MOST_LATER_MS = 10.0, 50.0
_m = models.messages.c


def run() -> list[Row]:
    """All well, and one hanging, by turns; the worker on one core, everything else on the other."""
    worker_core, other_core = machine.cores()
    with tempfile.TemporaryDirectory(prefix="buildrelay-bench-") as name, machine.on_core(other_core):
        directory = Path(name)
        with (
            servers.redis(directory) as redis_url,
            servers.receiver(0.0, directory) as good,
            servers.receiver(HANG_SECONDS, directory) as hanging,
        ):
            url = f"sqlite:///{directory}/fairness.db"
            servers.prepare(url)
            engine, redis = db.connect(url), queues.connect(redis_url)
            env = servers.worker_environment(url, redis_url, directory)
            well, ill = [], []
            for _ in range(TIMES):
                for found, last in ((well, good), (ill, hanging)):
                    with machine.on_core(worker_core), servers.worker(env, directory, "deliver"):
                        found.append(_measure(engine, redis, [good] * (SUBSCRIBERS - 1), last))
            engine.dispose()
    return _rows(well, ill)


def _measure(engine: Engine, redis, good: Sequence[str], last: str) -> tuple[float, float]:
    """Messages per second of the 19 from a backlog, and p99 in ms of those that come one by one."""
    with _subscribed(engine, good, last) as watched:
        recording.record(engine, BACKLOG_EVENTS, PACE)
        began = _last_moment(engine, watched, _m.created_at)
        queues.enqueue_once(redis, queues.DELIVER)
        _await(engine, watched)
        seconds = (_last_moment(engine, watched, _m.settled_at) - began).total_seconds()
        for _ in range(PACED_EVENTS):
            time.sleep(1 / PACED_PER_SECOND)  # the pace of the events, whatever the worker does
            recording.record(engine, 1, PACE)
            queues.enqueue_once(redis, queues.DELIVER)
        _await(engine, watched)
        late = _late(engine, watched, PACED_EVENTS * len(watched))
    return BACKLOG_EVENTS * len(watched) / seconds, late[int(len(late) * 0.99)]


@contextmanager
def _subscribed(engine: Engine, good: Sequence[str], last: str) -> Iterator[list[str]]:
    made = recording.subscribe(engine, [f"{url}/{number}" for number, url in enumerate([*good, last])])
    yield made[:-1]
    recording.remove(engine, made)


def _last_moment(engine: Engine, ids: Sequence[str], column):
    with db.reading(engine) as connection:
        return connection.execute(select(func.max(column)).where(_m.subscriber.in_(ids))).scalar_one()


def _await(engine: Engine, ids: Sequence[str]) -> None:
    left = select(_m.id).where(_m.subscriber.in_(ids), _m.state == "pending").limit(1)

    def is_done() -> bool:
        with db.reading(engine) as connection:
            return connection.execute(left).first() is None

    machine.wait_until(is_done, "the deliveries", pause_seconds=0.1)


def _late(engine: Engine, ids: Sequence[str], most: int) -> list[float]:
    """Sorted milliseconds from record to settlement of the latest messages."""
    chosen = select(_m.created_at, _m.settled_at).where(_m.subscriber.in_(ids))
    with db.reading(engine) as connection:
        rows = connection.execute(chosen.order_by(_m.id.desc()).limit(most)).all()
    return sorted((row.settled_at - row.created_at).total_seconds() * 1000 for row in rows)


def _rows(well: Sequence[tuple[float, float]], ill: Sequence[tuple[float, float]]) -> list[Row]:
    losses = [(1 - bad[0] / fine[0]) * 100 for fine, bad in zip(well, ill, strict=True)]
    later = [bad[1] - fine[1] for fine, bad in zip(well, ill, strict=True)]
    return [
        measured(PART, "19 of 20 from a backlog, all well, messages/s", [one[0] for one in well], "{:.0f}"),
        measured(PART, "the same while the 20th hangs", [one[0] for one in ill], "{:.0f}"),
        measured(PART, "throughput lost", losses, "{:.1f} %", most=MOST_LOSS),
        measured(PART, "19 of 20, record to delivered, all well, p99", [one[1] for one in well], "{:.0f} ms"),
        measured(PART, "the same while the 20th hangs", [one[1] for one in ill], "{:.0f} ms"),
        measured(PART, "p99 later by", later, "{:.0f} ms", most=MOST_LATER_MS),
    ]
