"""The metronome: rq-scheduler with the faults that matter here mended.  The only user of rq_scheduler.

What stock rq-scheduler 0.14 does, and what this wrapper does instead:

* it looks every 60 s, so a 15 s job runs once a minute: here every second
* registering at boot again may double an entry: here stable ids, and only what is missing is put back
* an entry whose job hash is lost never runs again: here each pass puts it back
* the lock of a dead scheduler blocks the next one: here it has an owner and lives a few seconds
* enqueue, ZREM, ZADD is not atomic, a crash between loses the entry: here the entry is moved, never removed
* it exits when Redis is away: here it waits and goes on

A tick rings the same bell as the web process, so one that comes twice or late does no harm.
"""

import logging
import random
import secrets
import signal
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime

from redis import Redis
from redis.exceptions import RedisError
from rq.exceptions import NoSuchJobError
from rq.job import Job
from rq_scheduler import Scheduler

from webhook_app import loglines, queues, settings
from webhook_app.settings import Settings

log = logging.getLogger(__name__)

PASS_SECONDS = 1.0
LOCK_SECONDS = 5
BEAT_SECONDS = 30
REDIS_SECONDS = 2.0
"""A Redis that says nothing for so long is away: waiting on would keep the ticks from everybody."""

MOST_ONCE_SECONDS = 3660
"""No single entry is asked for so far ahead (`ring_at`)."""

TICK, ONCE = "tick-", "once-"
"""How the ids of our entries begin, periodic and single."""


@dataclass(frozen=True, slots=True)
class Periodic:
    """One line of the table: this bell rings every so many seconds, and up to `jitter_seconds` later."""

    id: str
    bell: str
    interval_seconds: int
    jitter_seconds: float = 0.0


def table(values: Settings) -> tuple[Periodic, ...]:
    """The periodic jobs.  Polling ticks every 15 s, or faster where builds are polled faster."""
    return (
        Periodic(f"{TICK}poll", queues.POLL, max(1, min(15, int(values.poll_interval_seconds)))),
        Periodic(f"{TICK}deliver", queues.DELIVER, 5),
        Periodic(f"{TICK}sweep", queues.SWEEP, 15),
        Periodic(f"{TICK}replay", queues.REPLAY, 15),
        Periodic(f"{TICK}collect", queues.COLLECT, 5),
        Periodic(
            f"{TICK}discover",
            queues.DISCOVER,
            max(1, int(values.discovery_interval_seconds)),
            values.discovery_jitter_seconds,
        ),
        Periodic(f"{TICK}redeliver", queues.REDELIVER, 60, 10.0),
    )


class _Entries(Scheduler):  # type: ignore[misc]
    """What is scheduled here, under keys of our own: in a Redis that is shared, others' entries are theirs.

    They may be pickles, which are not read here, and theirs can't read our JSON.
    """

    scheduled_jobs_key = "buildrelay:scheduler:scheduled_jobs"
    scheduler_lock_key = "buildrelay:scheduler:lock"


def ring_at(redis: Redis, bell: str, when: datetime) -> None:
    """Ring a bell once at an aware time, rounded up to whole seconds; each second is asked for once."""
    second = int(when.timestamp()) + 1
    _Entries(queue_name=bell, connection=redis, job_class=queues.WakeUp).enqueue_at(
        datetime.fromtimestamp(second, UTC).replace(tzinfo=None),
        queues.JOBS[bell],
        job_id=f"{ONCE}{bell}-{second}",
        job_result_ttl=0,
    )


_RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""
_RENEW = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('EXPIRE', KEYS[1], ARGV[2]) end
return 0
"""


class Metronome(_Entries):
    """rq-scheduler's `Scheduler`, healed; `run_until` takes the place of its `run`."""

    def __init__(self, redis: Redis, periodic: tuple[Periodic, ...]) -> None:
        super().__init__(
            queue_name=queues.POLL, connection=redis, interval=PASS_SECONDS, job_class=queues.WakeUp
        )
        self.periodic = periodic
        self.owner = secrets.token_hex(8)

    def acquire_lock(self) -> bool:
        """Take or keep the lock; whoever holds it stays the metronome until it dies."""
        renewed = self.connection.eval(_RENEW, 1, self.scheduler_lock_key, self.owner, LOCK_SECONDS)
        self._lock_acquired = bool(
            renewed or self.connection.set(self.scheduler_lock_key, self.owner, nx=True, ex=LOCK_SECONDS)
        )
        return self._lock_acquired

    def remove_lock(self) -> None:
        """Give the lock back if it is ours."""
        self.connection.eval(_RELEASE, 1, self.scheduler_lock_key, self.owner)
        self._lock_acquired = False

    def enqueue_jobs(self) -> list[Job]:
        """One pass: put back what is missing, then ring what is due."""
        self.heal()
        jobs = list(self.get_jobs_to_queue())
        for job in jobs:
            self.enqueue_job(job)
        return jobs

    def heal(self) -> None:
        """Make the stored entries those of the table: every line once, no other tick beside them.

        A single entry that is too far ahead is from before the clock was set back: ticks find its work.
        """
        for line in self.periodic:
            if not self._is_stored(line):
                self._put(line)
        known = {line.id for line in self.periodic}
        for entry in self.connection.zrange(self.scheduled_jobs_key, 0, -1):
            job_id = entry.decode()
            if job_id.startswith(TICK) and job_id not in known:
                self._remove(job_id)
        late = time.time() + MOST_ONCE_SECONDS
        for entry in self.connection.zrangebyscore(self.scheduled_jobs_key, late, "+inf"):
            if entry.decode().startswith(ONCE):
                self._remove(entry.decode())

    def _is_stored(self, line: Periodic) -> bool:
        """Is the entry there as the table has it?  Far in the future means a clock that was put back."""
        due = self.connection.zscore(self.scheduled_jobs_key, line.id)
        latest = time.time() + line.interval_seconds + line.jitter_seconds + 1
        if due is None or due > latest:
            return False
        try:
            job = queues.WakeUp.fetch(line.id, connection=self.connection)
        except NoSuchJobError:
            return False
        return bool(job.origin == line.bell and job.meta == {"interval": line.interval_seconds})

    def _remove(self, job_id: str) -> None:
        """The job first: an entry without one is dropped by the next pass, a job without one would stay."""
        self.connection.delete(Job.key_for(job_id))
        self.connection.zrem(self.scheduled_jobs_key, job_id)

    def _put(self, line: Periodic) -> None:
        self.schedule(
            datetime.now(UTC).replace(tzinfo=None),
            queues.JOBS[line.bell],
            interval=line.interval_seconds,
            id=line.id,
            queue_name=line.bell,
        )

    def enqueue_job(self, job: Job) -> None:
        """Ring the bell of a due entry; a tick moves on and is never absent, anything else goes then."""
        self._ring(job.origin)
        line = next((line for line in self.periodic if line.id == job.id), None)
        if line is None:
            self._remove(job.id)
            return
        wait = line.interval_seconds + random.uniform(0, line.jitter_seconds)  # noqa: S311  spreads load, guards nothing
        self.connection.zadd(self.scheduled_jobs_key, {job.id: int(time.time() + wait)})

    def _ring(self, bell: str) -> None:
        """Queue the bell's job unless one waits there already, whatever a ring cut short has left behind."""
        if bell in queues.JOBS:
            queues.answer(self.connection, bell)
            queues.enqueue_once(self.connection, bell)

    def beat(self) -> None:
        """Show that a metronome is alive (`/readyz`)."""
        self.connection.set(queues.BEAT_KEY, str(int(time.time())), ex=BEAT_SECONDS)

    def run_until(self, stop: threading.Event) -> None:
        """Pass after pass until `stop`; a Redis that is away is waited for."""
        told = -queues.NEWS_SECONDS
        while not stop.is_set():
            started = time.monotonic()
            try:
                if self.acquire_lock():
                    self.enqueue_jobs()
                    self.beat()
            except RedisError as error:
                if time.monotonic() - told > queues.NEWS_SECONDS:
                    log.warning("%s: the metronome waits: %s", queues.trouble(error), queues.reason(error))
                    told = time.monotonic()
            stop.wait(max(0.0, PASS_SECONDS - (time.monotonic() - started)))
        try:
            self.remove_lock()
        except RedisError:
            log.debug("redis is gone, the lock ends by itself")


def main() -> None:
    """The scheduler process."""
    values = settings.load()
    loglines.setup(values.log_format, values.log_level, settings.redact(values))
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    Metronome(queues.connect(values.redis_url, REDIS_SECONDS, connections=1), table(values)).run_until(stop)


if __name__ == "__main__":
    main()
