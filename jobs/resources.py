"""What a worker process holds: settings, engine, Redis, outgoing threads; made once, lazily, per process."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache

from redis import Redis
from sqlalchemy import Engine

from webhook_app import db, queues, settings
from webhook_app.polling import Pace
from webhook_app.times import utc_now

DELIVERY_THREADS = 128
POLL_THREADS = 8


@dataclass(frozen=True, slots=True)
class Resources:
    """Handles shared by the jobs of one process."""

    settings: settings.Settings
    engine: Engine
    redis: Redis
    threads: ThreadPoolExecutor
    started_at: datetime = field(default_factory=utc_now)

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
        db.connect(values.database_url, values.sqlite_synchronous),
        queues.connect(values.redis_url),
        ThreadPoolExecutor(max(DELIVERY_THREADS, POLL_THREADS), thread_name_prefix="outgoing"),
    )
