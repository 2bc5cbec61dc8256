"""The bell: names of the jobs, and `ring()`.  Redis is only that; whatever it loses, a tick finds again.

RQ takes a job by its dotted name, so the core never imports `jobs`; a test resolves each name.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from redis import BlockingConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.exceptions import ClusterDownError, ReadOnlyError, RedisError, ResponseError, TryAgainError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry
from rq import Queue, Worker
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.utils import decode_redis_hash

log = logging.getLogger(__name__)

DELIVER, POLL, SWEEP, DISCOVER = "deliver", "poll", "sweep", "discover"
REDELIVER, REPLAY, COLLECT = "redeliver", "replay", "collect"

JOBS = {
    DELIVER: "jobs.deliver.deliver",
    POLL: "jobs.poll.poll",
    SWEEP: "jobs.sweep.sweep",
    DISCOVER: "jobs.poll.discover",
    REDELIVER: "jobs.redeliver.redeliver",
    REPLAY: "jobs.replay.replay",
    COLLECT: "jobs.collect.collect",
}
"""Queue and job by bell.  Each bell has a queue of its own, so that none waits for another."""

JOB_TIMEOUT_SECONDS = 180
FAILURE_SECONDS = 60
"""A job that failed is kept in Redis so long: the log has its trace, and an outage would fill Redis."""
BELL_TTL_SECONDS = 2
DEAF_SECONDS = 1.0
NEWS_SECONDS = 60.0
"""Between two lines of the log in which a process says that Redis is away, at least."""

CONNECTIONS = 2
"""To Redis, of one process at most: small plans allow 20 in all.  Who finds none waits in line."""

WORKER_SECONDS = 2.0
"""For which a worker waits for a connection to be made, or to be free."""

NOT_WRITABLE = (ReadOnlyError, ClusterDownError, TryAgainError)
"""`READONLY`, `MASTERDOWN`, `CLUSTERDOWN`, `TRYAGAIN`.  Who waits meanwhile is told `UNBLOCKED`."""

BEAT_KEY = "buildrelay:scheduler:beat"
"""Set, and renewed, by a living scheduler to the Unix time of its last pass (`beat` reads it)."""


_NEVER_READ = (
    "success_callback_name", "failure_callback_name", "stopped_callback_name", "webhooks",
    "dependency_id", "dependency_ids",
)  # fmt: skip
"""Fields of a job in Redis that name what else RQ is to call; ours have none."""


class NotOurJob(Exception):
    """A queue held a job that is none of `JOBS`; it was not run."""


class WakeUp(Job):
    """A queued job that is JSON and one of `JOBS`, without arguments.

    RQ's own reads pickles, and calls whatever functions and URLs the job in Redis names: whoever can write to
    Redis could run any code here.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        """As RQ calls it: id, connection, and a serializer, which does not count."""
        super().__init__(*given[:2], **named | {"serializer": JSONSerializer})

    def restore(self, raw_data: Any) -> Any:
        """Take over what Redis holds, but for what else would be called."""
        told = decode_redis_hash(raw_data)
        return super().restore({name: value for name, value in told.items() if name not in _NEVER_READ})

    def _execute(self) -> Any:
        if self.func_name not in JOBS.values() or self.instance is not None or self.args or self.kwargs:
            raise NotOurJob(str(self.func_name)[:100])
        return super()._execute()


WRONG_TOKENS_KEY = "buildrelay:wrong_tokens"
"""How many API requests came with a wrong token, to all web processes."""


def connect(url: str, timeout_seconds: float | None = None, connections: int = CONNECTIONS) -> Redis:
    """A Redis client with so many connections at most; nothing is opened yet.

    `timeout_seconds` bounds connecting, each command and the wait for a connection: the web process must not
    wait for a bell.  Without it (workers) a command waits as long as RQ says, and is repeated once.
    The certificate of `rediss://` is verified unless the URL says otherwise (`settings.load` puts it there).
    """
    limit = WORKER_SECONDS if timeout_seconds is None else timeout_seconds
    options: dict[str, Any] = {
        "max_connections": connections,
        "timeout": limit,
        "socket_connect_timeout": limit,
        "socket_timeout": timeout_seconds,
        "retry": Retry(NoBackoff(), 1 if timeout_seconds is None else 0),
    }
    if url.startswith("unix://"):
        del options["socket_connect_timeout"]
    pool = BlockingConnectionPool.from_url(url, **options)
    pool.connection_class = type("Connection", (_Writable, pool.connection_class), {"pool": pool})
    return Redis.from_pool(pool)


class _Writable:
    """Part of a connection: a server that answers but can't be written is as good as away.

    A replica, or a primary that has become one, would be asked for ever: all free connections are dropped,
    and the next ones go where the address leads by then.  To callers it is a lost connection.
    """

    pool: BlockingConnectionPool

    def read_response(self, *given: Any, **named: Any) -> Any:
        """The next answer, as redis-py gives it."""
        try:
            return super().read_response(*given, **named)  # type: ignore[misc]
        except ResponseError as error:
            if not isinstance(error, NOT_WRITABLE) and not str(error).startswith("UNBLOCKED"):
                raise
            self.disconnect()  # type: ignore[attr-defined]
            self.pool.disconnect(inuse_connections=False)
            raise RedisConnectionError(f"Redis can't be written: {error}") from error


def is_untrusted(error: RedisError) -> bool:
    """Whether the certificate of the server was refused."""
    return "CERTIFICATE_VERIFY_FAILED" in str(error)


def reason(error: RedisError) -> str:
    """What went wrong, and the way out where that is a setting: a certificate that is not trusted."""
    if not is_untrusted(error):
        return str(error)
    return (
        "its certificate is refused; REDIS_URL with ?ssl_ca_certs=FILE names who signs it,"
        f" REDIS_TLS_VERIFY=false takes any ({error})"
    )


def trouble(error: RedisError) -> str:
    """What an error of Redis means, in words that hold no address and no secret."""
    text = str(error)  # in a transaction an error of the server has others of redis-py around it
    named = (plain for mark, plain in _TROUBLES.items() if mark in text)
    if isinstance(error, ReadOnlyError) or isinstance(error.__cause__, ReadOnlyError):
        return _TROUBLES["READONLY"]
    return next(named, f"Redis does not answer ({type(error).__name__})")


_TROUBLES = {
    "OOM command not allowed": "Redis is out of memory",
    "command not allowed when used memory": "Redis is out of memory",
    "READONLY": "Redis is read-only (a replica)",
    "UNBLOCKED": "Redis is read-only (a replica)",  # while a worker waited for a job
    "MISCONF": "Redis can't write to its disk",
    "LOADING": "Redis is starting: it loads its data",
    "CERTIFICATE_VERIFY_FAILED": "the certificate of Redis is refused (REDIS_TLS_VERIFY)",
    "NOAUTH": "Redis wants another password",
    "WRONGPASS": "Redis wants another password",
}


def try_write(redis: Redis) -> None:
    """Write what nobody reads: a Redis that is full or read-only answers all else.  Raises `RedisError`."""
    redis.set("buildrelay:probe", b"1", ex=60)


def bell_key(bell: str) -> str:
    """Set while a job is queued for this bell and has not begun."""
    return f"buildrelay:bell:{bell}"


@dataclass(slots=True)
class Bell:
    """Wakes workers after a commit.  Never raises; after a failure it stays silent for a second."""

    redis: Redis
    _deaf_until: float = field(default=0.0)

    def ring(self, *bells: str) -> bool:
        """Queue a job for each bell unless one is waiting to begin; False if Redis could not be told."""
        if time.monotonic() < self._deaf_until:
            return False
        try:
            for bell in bells:
                enqueue_once(self.redis, bell)
        except RedisError as error:
            self._deaf_until = time.monotonic() + DEAF_SECONDS
            log.warning("%s: the next tick will find the work: %s", trouble(error), reason(error))
            return False
        return True


def enqueue_once(redis: Redis, bell: str) -> bool:
    """Queue the job of `bell` unless one that has not begun is queued already.

    The key spares a look at the queue; it is short-lived, because the worker that took the job may
    have died before it began.
    """
    if not redis.set(bell_key(bell), b"1", nx=True, ex=BELL_TTL_SECONDS):
        return False
    queue = Queue(bell, connection=redis, job_class=WakeUp, serializer=JSONSerializer)
    if queue.count:
        return False
    queue.enqueue(JOBS[bell], job_timeout=JOB_TIMEOUT_SECONDS, result_ttl=0, failure_ttl=FAILURE_SECONDS)
    return True


def beat(redis: Redis) -> int | None:
    """Unix time of the last pass of a living scheduler; None if there is none.  Raises `RedisError`."""
    told = redis.get(BEAT_KEY)
    return int(told) if isinstance(told, bytes) and told.isdigit() else None


def wrong_tokens(redis: Redis) -> int:
    """How many API requests came with a wrong token since Redis was emptied.  Raises `RedisError`."""
    told = redis.get(WRONG_TOKENS_KEY)
    return int(told) if isinstance(told, bytes) and told.isdigit() else 0


def workers(redis: Redis) -> Counter[str]:
    """How many living workers serve each bell.  Raises `RedisError`.

    RQ forgets a worker whose heartbeat stayed away, so those it knows are alive.
    """
    return Counter(bell for worker in Worker.all(connection=redis) for bell in worker.queue_names())


def bells_served_by(redis: Redis, pids: Collection[int], since: datetime) -> set[str]:
    """The bells that these processes of this machine serve, of workers born `since`.  Raises `RedisError`.

    A worker that was killed is known for some seconds yet, and its pid may be given again.
    """
    return {
        bell
        for worker in Worker.all(connection=redis)
        if worker.pid in pids and worker.hostname == os.uname().nodename
        if worker.birth_date is not None and worker.birth_date >= since
        for bell in worker.queue_names()
    }


def is_served(redis: Redis, bell: str) -> bool:
    """Does a living worker serve this bell?  False too when Redis does not answer."""
    try:
        return workers(redis)[bell] > 0
    except RedisError:
        return False


def answer(redis: Redis, bell: str) -> bool:
    """A job begins, or looks up from its work: from now on new work needs a new ring.  Had it been rung?"""
    return bool(redis.delete(bell_key(bell)))
