"""One worker process: RQ's non-forking worker on the queues it is given.

Non-forking, so that connections to subscribers and the database stay open between jobs and no
interpreter or import is paid per message.  A worker that dies is started again by its supervisor.
"""

import argparse
import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import RedisError
from rq import SimpleWorker, worker_registration
from rq.exceptions import StopRequested
from rq.worker import DequeueStrategy

from jobs import (  # noqa: F401  imported before the first job needs them
    collect,
    deliver,
    poll,
    redeliver,
    replay,
    sweep,
)
from jobs.resources import resources
from webhook_app import loglines, queues

log = logging.getLogger(__name__)

WAIT_SECONDS = 1.0
TTL_SECONDS = 20
"""RQ listens for a job for 15 s less, and takes a connection that says nothing for 5 s less for dead."""

BEAT_SECONDS = 5.0
LIFE_SECONDS = 15
"""A killed worker is counted for so long; one that works shows by its beats that it lives."""


class PatientWorker(SimpleWorker):
    """RQ's worker, made for a Redis that comes and goes.

    * RQ doubles its wait for a Redis that is away up to a minute: here it stays at a second
    * RQ counts a killed worker for 80 s, and with a job for minutes: here a thread says that we live
    * RQ signs a worker on once, so a flushed Redis never hears of it again: here a heartbeat does it
    * RQ forgets a stop signal when Redis is away at its end: here it is remembered
    * RQ takes the first queue that has a job, so a busy one starves those behind it: here they take turns
    * RQ listens for remote commands in a thread that holds up each end by a second: nobody gives any here
    """

    exponential_backoff_factor = 1.0
    asked_to_end = False

    def heartbeat(self, timeout: int | None = None, pipeline: Pipeline | None = None) -> None:
        """Show that we are alive; sign on again if Redis does not know us."""
        super().heartbeat(LIFE_SECONDS, pipeline)
        if pipeline is None and not self.connection.sismember(self.redis_workers_keys, self.key):
            self.connection.hset(self.key, mapping=self.serialize())
            worker_registration.register(self)

    def work(self, *given: Any, **named: Any) -> bool:
        """Work, and show all the while that we are alive."""
        over = threading.Event()
        threading.Thread(target=self._beat, args=(over,), name="beat", daemon=True).start()
        try:
            return super().work(*given, **named)
        finally:
            over.set()

    def _beat(self, over: threading.Event) -> None:
        while not over.wait(BEAT_SECONDS):
            with suppress(RedisError):
                self.connection.expire(self.key, LIFE_SECONDS)

    def subscribe(self) -> None:
        """Listen for no commands."""

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """End after the job under way, which begins nothing new; what it began is noted yet."""
        self.asked_to_end = True
        resources().desk.closing = True
        super().request_stop(signum, frame)  # type: ignore[no-untyped-call]


def main() -> None:
    """Work until told to stop; wait for a Redis that is away."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("queues", nargs="*", default=list(queues.JOBS), help="queues to serve")
    names = parser.parse_args().queues
    held = resources()
    loglines.setup(held.settings.log_format, held.settings.log_level)
    with suppress(StopRequested):  # RQ's signal handler raises it, also while we wait
        _work(names, held.redis)


def _work(names: Sequence[str], redis: Redis) -> None:
    worker: PatientWorker | None = None
    told = -queues.NEWS_SECONDS
    while worker is None or not worker.asked_to_end:
        try:
            worker = PatientWorker(names, connection=redis, worker_ttl=TTL_SECONDS)
            worker.log_job_description = False
            worker.work(
                logging_level="WARNING", with_scheduler=False, dequeue_strategy=DequeueStrategy.ROUND_ROBIN
            )
            return
        except RedisError as error:
            if time.monotonic() - told > queues.NEWS_SECONDS:
                log.warning("redis does not answer, the worker waits: %s", error)
                told = time.monotonic()
            time.sleep(WAIT_SECONDS)


if __name__ == "__main__":
    main()
