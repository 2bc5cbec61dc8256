"""One worker process: RQ's non-forking worker on the queues it is given.

Non-forking, so that connections to subscribers and the database stay open between jobs and no
interpreter or import is paid per message.  A worker that dies is started again by its supervisor.

SIGTERM and SIGINT: nothing new begins, and what is under way has `STOP_GRACE_SECONDS` to end and to be
noted.  A second signal changes nothing: on a platform that signals every process one comes from there
and one from the supervisor.
"""

import argparse
import logging
import signal
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
from rq.serializers import JSONSerializer
from rq.worker import DequeueStrategy, WorkerStatus

from jobs import (  # noqa: F401  imported before the first job needs them
    collect,
    deliver,
    poll,
    redeliver,
    replay,
    sweep,
)
from jobs.resources import Resources, resources
from webhook_app import loglines, queues, workers
from webhook_app.supervisor import end_process
from webhook_app.times import utc_now

log = logging.getLogger(__name__)

WAIT_SECONDS = 1.0
TTL_SECONDS = 17
"""RQ listens for a job for 15 s less, then asks again."""

SILENCE_SECONDS = 3
"""A connection that says nothing for so long after that is dead."""

BEAT_SECONDS = 5.0
LIFE_SECONDS = 15
"""A killed worker is counted for so long; one that works shows by its beats that it lives."""


_asked_to_end = threading.Event()
"""Set by the first stop signal."""


class PatientWorker(SimpleWorker):
    """RQ's worker, made for a Redis that comes and goes.

    * RQ doubles its wait for a Redis that is away up to a minute: here it stays at a second
    * RQ counts a killed worker for 80 s, and with a job for minutes: here a thread says that we live
    * RQ signs a worker on once, so a flushed Redis never hears of it again: here a heartbeat does it
    * RQ forgets a stop signal when Redis is away at its end: here it is remembered
    * RQ kills its job at a second stop signal: here it changes nothing
    * RQ takes the first queue that has a job, so a busy one starves those behind it: here they take turns
    * RQ reads jobs as pickles and runs what they name: here they are JSON and ours (`queues.WakeUp`)
    * RQ listens for remote commands in a thread that holds up each end by a second: nobody gives any here
    """

    exponential_backoff_factor = 1.0

    @property
    def connection_timeout(self) -> int:
        """Seconds that a command may take; RQ adds 10 to those that it listens."""
        return int(self.dequeue_timeout) + SILENCE_SECONDS

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
        """End after the job under way, which begins nothing new; what it began is noted yet.

        RQ speaks to Redis here; but a signal may come in the middle of a transaction, and Redis may be gone.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        logging.getLogger("rq").setLevel(logging.CRITICAL)  # Redis may be told to end too: that is no news
        resources().desk.closing = True
        _asked_to_end.set()
        if self.get_state() != WorkerStatus.BUSY:
            raise StopRequested
        self._stop_requested = True


def _end_in_time(held: Resources) -> None:
    """End this process when the grace after a stop signal is over, whatever is still under way.

    A delivery that is cut is not noted: when its lease has run out it is sent again, and no failure counts.
    """
    _asked_to_end.wait()
    threading.Thread(target=deliver.leave_desk, args=(held,), name="leave", daemon=True).start()
    time.sleep(held.settings.stop_grace_seconds)
    cut = held.desk.room.subscribers.total()
    if cut:
        log.warning("the time to end is over: %d deliveries were cut and will be sent again", cut)
    end_process(0)


def main() -> None:
    """Work until told to stop; wait for a Redis that is away."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("queues", nargs="*", default=list(queues.JOBS), help="queues to serve")
    names = parser.parse_args().queues
    held = resources()
    loglines.setup(held.settings.log_format, held.settings.log_level, held.redact)
    logging.getLogger("rq.worker").addFilter(_is_news)
    threading.Thread(target=_end_in_time, args=(held,), name="end", daemon=True).start()
    _begin(held, names)
    with suppress(StopRequested):  # RQ's signal handler raises it, also while we wait
        _work(names, held.redis)
    held.threads.shutdown()  # deliveries under way, each of which notes how it went
    end_process(0)


def _begin(held: Resources, names: Sequence[str]) -> None:
    """Take over what a dead predecessor held; where messages are delivered, do so at once and keep watch."""
    freed = workers.begin(held.engine, held.settings.data_dir, names[0], utc_now())
    held.desk.worker = workers.own_id()
    if freed:
        log.warning("the worker before this one was killed: %d messages are due again", freed)
    if queues.DELIVER not in names:
        return
    threading.Thread(
        target=deliver.attend, args=(held, threading.Event()), name="attend", daemon=True
    ).start()
    with suppress(RedisError):  # a tick finds the work
        queues.answer(held.redis, queues.DELIVER)
        queues.enqueue_once(held.redis, queues.DELIVER)


_said_at = [-queues.NEWS_SECONDS]
"""When a line of the log last said that the worker waits for Redis (monotonic)."""


def _is_news(record: logging.LogRecord) -> bool:
    """Keep RQ's words about a Redis that is away out of the log, but for one line in a while in ours.

    It tells each error with a trace before it hands it on to us, and each of its own attempts to go on.
    """
    if record.exc_info and isinstance(record.exc_info[1], RedisError):
        return False
    given = record.args if isinstance(record.args, tuple) else ()
    error = next((one for one in given if isinstance(one, RedisError)), None)
    if error is not None:
        _say_waiting(error)
    return error is None


def _say_waiting(error: RedisError) -> None:
    if time.monotonic() - _said_at[0] > queues.NEWS_SECONDS:
        log.warning("%s: the worker waits: %s", queues.trouble(error), queues.reason(error))
        _said_at[0] = time.monotonic()


def _work(names: Sequence[str], redis: Redis) -> None:
    while not _asked_to_end.is_set():
        try:
            worker = PatientWorker(
                names,
                connection=redis,
                worker_ttl=TTL_SECONDS,
                job_class=queues.WakeUp,
                serializer=JSONSerializer,
            )
            worker.log_job_description = False
            worker.work(
                logging_level="WARNING", with_scheduler=False, dequeue_strategy=DequeueStrategy.ROUND_ROBIN
            )
            return
        except RedisError as error:
            if _asked_to_end.is_set():
                return
            _say_waiting(error)
            time.sleep(WAIT_SECONDS)


if __name__ == "__main__":
    main()
