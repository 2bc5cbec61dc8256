"""What a worker process holds: settings, engine, Redis, outgoing threads; made once, lazily, per process."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from queue import SimpleQueue
from typing import Any

from redis import Redis
from sqlalchemy import Engine

from webhook_app import clock, db, queues, settings, workers
from webhook_app.deliveries import Tried
from webhook_app.polling import Pace
from webhook_app.redaction import Redactor
from webhook_app.room import IN_FLIGHT, Room
from webhook_app.times import utc_now

DATABASE_CONNECTIONS = 3
"""To PostgreSQL, of one worker: `db.CONNECTIONS` is for a web process."""

REDIS_CONNECTIONS = 3
"""One listens for jobs, one shows that the worker lives, and one rings."""


@dataclass(slots=True)
class Desk:
    """Where the sending threads hand in how a try went, with the subscriber's row.

    A delivery job attends it; requests that outlast one job are taken over by the next.  While nobody
    attends it a thread settles its own try.  `lock` is held for handing in, and to come and go;
    `room` belongs to whoever attends, else to the holder of the lock.  `closing`: no job of
    this process takes anything new.  `worker`: the id in its claims.  `under_way`: the ids of the messages
    that it has, as they stand in its row of `workers`, and `shown_at` when that was written (monotonic).
    `unsettled`: tries that the store could not take, for the next transaction; `is_uncertain`: whether the
    last one may have been stored although its commit was not confirmed.
    """

    room: Room = field(default_factory=Room)
    results: "SimpleQueue[tuple[Tried, Mapping[str, Any]]]" = field(default_factory=SimpleQueue)
    attended: bool = False
    closing: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    one_job: threading.Lock = field(default_factory=threading.Lock)
    worker: str = field(default_factory=workers.own_id)
    under_way: frozenset[int] = frozenset()
    shown_at: float = 0.0
    unsettled: list[Tried] = field(default_factory=list)
    is_uncertain: bool = False
    mutex: threading.Lock = field(default_factory=threading.Lock)

    def take_unsettled(self, most: int) -> list[Tried]:
        """The oldest of `unsettled`, for a transaction."""
        with self.mutex:
            taken, self.unsettled = self.unsettled[:most], self.unsettled[most:]
        return taken

    def put_back(self, tries: Sequence[Tried]) -> None:
        """The transaction was not confirmed."""
        with self.mutex:
            self.unsettled, self.is_uncertain = [*tries, *self.unsettled], True


@dataclass(frozen=True, slots=True)
class Resources:
    """Handles shared by the jobs of one process."""

    settings: settings.Settings
    engine: Engine
    redis: Redis
    threads: ThreadPoolExecutor
    started_at: datetime = field(default_factory=utc_now)
    desk: Desk = field(default_factory=Desk)
    steps: clock.Steps = field(default_factory=clock.Steps)
    redact: Redactor = field(init=False)
    """What masks the secrets of the settings, and what looks like one."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "redact", settings.redact(self.settings))

    @property
    def pace(self) -> Pace:
        """The pace of polling."""
        return settings.pace(self.settings)


@cache
def resources() -> Resources:
    """This process's handles."""
    values = settings.load()
    return Resources(
        values,
        db.connect(
            values.database_url,
            values.sqlite_synchronous,
            connections=DATABASE_CONNECTIONS,
            pooler=values.database_pooler,
        ),
        queues.connect(values.redis_url, connections=REDIS_CONNECTIONS),
        ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="outgoing"),
        desk=Desk(Room(per_host=values.delivery_host_concurrency)),
    )
